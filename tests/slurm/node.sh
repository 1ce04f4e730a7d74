#!/usr/bin/env bash
# One node of the test cluster: process 1 of its own namespaces (started by cluster.py through unshare).
#   node.sh NAME ADDRESS/PREFIX FOLDER
# When it ends, the kernel ends everything on the node.
set -u
name=$1 address=$2 folder=$3

read -r pid _ </proc/self/stat   # still the host's /proc: this process as the host knows it
mkdir -p "$folder/nodes/$name/cgroup"
hostname "$name"

mount -t proc proc /proc
mount --rbind /sys/fs/cgroup "$folder/nodes/$name/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$folder/nodes/$name/cgroup" /sys/fs/cgroup
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# Names come from one file, as on a cluster they come from one name server.
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/nsswitch.conf" /etc/nsswitch.conf

ip link set lo up
echo "$pid" >"$folder/nodes/$name/pid"
until [ -e /sys/class/net/eth0 ]; do sleep 0.05; done
ip address add "$address" dev eth0
ip link set eth0 up

slurmd -D -f "$folder/etc/slurm.conf" >>"$folder/log/slurmd.$name.out" 2>&1
sleep infinity  # slurmd was killed: the node and what runs on it live on
