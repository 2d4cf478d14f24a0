#!/bin/bash
# Boots kernels under qemu and runs the tests of fastdp in them.
#
#	kernels/run.sh [-r REGEX] [-a APPEND] [-s SCRIPT] [-q ARGUMENTS] [VERSION...]
#
# REGEX chooses the tests; the default leaves out those that need a machine which keeps time.
# SCRIPT is run in place of the tests, with meshd and meshctl in the PATH: what needs a machine of its own. ARGUMENTS
# are more of qemu's.
# APPEND is added to the kernel's command line; the default locks the kernel down, so that nothing is needed that a
# host with secure boot forbids. The kernel's own BTF is hidden, as in kernels built without it.
# VERSION is a Debian kernel series such as 6.1 or 6.12 (the newest cloud image of that series that apt
# knows), or the path of a linux-image .deb. Default: 6.1, the oldest that is supported, and 6.12. The
# guest is an initramfs with busybox, the static test binary and the few tools that the tests call; it has
# no disk and no network, and is emulated (KERNELS_ACCEL=kvm where that works: it hangs in some clouds). Needs: qemu-system-x86, busybox-static (or busybox), kmod, cpio, iproute2,
# util-linux, nftables, ethtool. Packages are fetched with apt-get download into $KERNELS_DIR.
#
# Prints the test output of each kernel, then one line "kernel VERSION: ok" or "FAILED" with what of the newer
# kernels' features was there; exit status 1 if any failed.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."

regex='TestPort|TestVxIn|TestUnderIn|TestShortWay|TestFirewall|TestLeftovers|TestHostRefuses|TestBridgeOut|TestGroupRate|TestProbe|TestScale|TestMigrate|TestLayout|TestTwoHosts|TestRelay|TestForged|TestIsolation|TestTwice|TestRemove|Fuzz'
append=lockdown=confidentiality
script= arguments=
while getopts r:a:s:q: o; do
	case $o in r) regex=$OPTARG ;; a) append=$OPTARG ;; s) script=$OPTARG ;; q) arguments=$OPTARG ;; *) exit 2 ;; esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- 6.1 6.12

work=${KERNELS_DIR:-/tmp/meshd-kernels}
mkdir -p "$work"
for tool in qemu-system-x86_64 busybox depmod xz cpio ip nsenter bridge nft tc ethtool setpriv; do
	command -v "$tool" >/dev/null || { echo "missing: $tool" >&2; exit 2; }
done

fetch() { # prints the path of the package for a series
	local series=$1 name
	name=$(apt-cache search "^linux-image-${series//./\\.}\.[0-9.+a-z-]*cloud-amd64\$" | awk '{print $1}' | grep -v unsigned | sort -V | tail -1)
	[ -n "$name" ] || { echo "apt knows no kernel $series (apt-get update?)" >&2; return 1; }
	(cd "$work" && { ls "${name}"_*.deb >/dev/null 2>&1 || apt-get download -q "$name" >&2; } && ls "$PWD/${name}"_*.deb | tail -1)
}

export CGO_ENABLED=0
programs=("$work/fastdp.test")
if [ -n "$script" ]; then
	case $script in /*) ;; *) script=$from/$script ;; esac
	programs=("$work/meshd" "$work/meshctl" "$script")
	go build -o "$work" ../cmd/meshd ../cmd/meshctl
	run="PATH=/test:\$PATH sh ./$(basename "$script")"
	show=cat
else
	go test -c -o "$work/fastdp.test" .
	run="./fastdp.test -test.run '$regex' -test.short -test.v -test.timeout 20m"
	show="grep -E '^ *(---|PASS|FAIL|panic)|_test.go'"
fi

boot() { # package: runs the tests in its kernel
	local deb=$1 root version
	root=$(mktemp -d "$work/root.XXXXXX")
	trap 'rm -rf "$root"' RETURN
	dpkg-deb -x "$deb" "$root/deb"
	version=$(ls "$root/deb/lib/modules")
	mkdir -p "$root/fs"/{bin,sbin,proc,sys,dev,tmp,run,etc,test,root} "$root/fs/lib/modules/$version"
	cp "${programs[@]}" "$root/fs/test/"
	cp -r testdata bpf "$root/fs/test/"
	cp "$(command -v busybox)" "$root/fs/bin/busybox"
	# Tools with their libraries, at the paths where they are here.
	local tool
	for tool in ip nsenter bridge nft tc ethtool setpriv; do
		tool=$(readlink -f "$(command -v "$tool")")
		cp --parents "$tool" "$root/fs/"
		ln -sf "$tool" "$root/fs/bin/$(basename "$tool")"
		ldd "$tool" | grep -o '/[^ ]*' | while read -r lib; do cp -L --parents "$lib" "$root/fs/"; done
	done
	local m
	for m in net lib crypto arch drivers/net/veth.ko drivers/net/tun.ko drivers/net/vxlan; do
		for m in "lib/modules/$version/kernel/$m"{,.xz}; do
			if [ -e "$root/deb/$m" ]; then (cd "$root/deb" && cp -r --parents "$m" "$root/fs/"); fi
		done
	done
	find "$root/fs/lib/modules" -name '*.ko.xz' -exec xz -d {} +
	cp "$root/deb/lib/modules/$version"/modules.{builtin,order}* "$root/fs/lib/modules/$version/" 2>/dev/null || true
	depmod -b "$root/fs" "$version"
	cat >"$root/fs/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/root TMPDIR=/tmp FASTDP_SLOW=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/net
echo /bin/modprobe >/proc/sys/kernel/modprobe
[ ! -d /sys/kernel/btf ] || mount -t tmpfs none /sys/kernel/btf
mount -t securityfs none /sys/kernel/security && echo "lockdown: \$(cat /sys/kernel/security/lockdown)"
for m in bridge vxlan veth tun sch_ingress cls_bpf nf_tables af_packet; do modprobe \$m 2>/dev/null; done
ip link set lo up
cd /test
{ $run 2>&1; echo \$? >/tmp/rc; } | $show
rc=\$(cat /tmp/rc)
echo "RESULT \$rc"
poweroff -f
INIT
	chmod +x "$root/fs/init"
	(cd "$root/fs" && find . | cpio -o -H newc --quiet | gzip -1) >"$root/initrd"
	timeout 1500 qemu-system-x86_64 -accel "${KERNELS_ACCEL:-tcg}" -cpu max -smp 2 -m 2048 -no-reboot -nodefaults -display none -serial stdio $arguments \
		-kernel "$root/deb/boot/vmlinuz-$version" -initrd "$root/initrd" -append "console=ttyS0 quiet panic=-1 $append" </dev/null | sed -u 's/\r//' | tee "$root/log"
	local with
	with=$(grep -o 'features: .*' "$root/log" | sed 's/^features: /; /' | tail -1 || true)
	if grep -q '^RESULT 0$' "$root/log"; then
		verdicts+="kernel $version: ok$with"$'\n'
	else
		verdicts+="kernel $version: FAILED$with"$'\n'
		return 1
	fi
}

verdicts=
status=0
for v; do
	if [ -f "$v" ]; then deb=$v; else deb=$(fetch "$v"); fi
	boot "$deb" || status=1
done
printf '%s' "$verdicts"
exit $status
