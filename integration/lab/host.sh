# Makes the mount namespace that it runs in a host's own, then waits as process 1 of that host.
# Usage: sh host.sh SCRATCH HOSTNAME. Prints "ready" when the host can be used.
set -e
scratch=$1
name=$2

mount --make-rprivate /
mount -t proc proc /proc
# What is mounted below the directories that are replaced would stay in the way, unseen.
grep -oE ' /(run|var/lib/docker)/[^ ]*' /proc/self/mountinfo | sort -r | while read -r m; do umount -l "$m" 2>/dev/null || :; done

# A fresh sysfs shows this network namespace's devices; the cgroup tree is the machine's.
mount -t tmpfs -o mode=0755 lab "$scratch"
mkdir "$scratch/cgroup" "$scratch/etc" "$scratch/etc.work" "$scratch/var" "$scratch/var.work"
mount --rbind /sys/fs/cgroup "$scratch/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$scratch/cgroup" /sys/fs/cgroup
umount -l "$scratch/cgroup"
mount -t bpf bpf /sys/fs/bpf

# Whatever is written to /etc, /var and /run stays in this host and goes with it.
mount -t overlay -o "lowerdir=/etc,upperdir=$scratch/etc,workdir=$scratch/etc.work" lab /etc
mount -t overlay -o "lowerdir=/var,upperdir=$scratch/var,workdir=$scratch/var.work" lab /var
mount -t tmpfs -o mode=0755 lab /run
mkdir -p /run/lock /run/mount /run/netns
rm -rf /etc/docker /etc/resolv.conf /etc/hosts /etc/hostname /var/lib/meshd /var/lib/docker /var/log/meshd*
mkdir /var/lib/docker
mount -t tmpfs -o mode=0710 lab /var/lib/docker
mount --bind /run/netns /run/netns
mount --make-shared /run/netns
: > /etc/resolv.conf
echo "$name" > /etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost\n' "$name" > /etc/hosts
hostname "$name"

sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
ip link set lo up
echo ready
# The shell is process 1: while it waits, it also collects the orphans that end up with it.
while :; do
	sleep 2147483647 &
	wait $! || :
done
