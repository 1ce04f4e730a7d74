"""The method as the papers write it: tensors in, tensors out. No process group, no recipe, no model class."""
