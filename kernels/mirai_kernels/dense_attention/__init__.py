"""Dense attention of which only parts are computed at a time: with the log-sum-exp that joins the parts again."""
