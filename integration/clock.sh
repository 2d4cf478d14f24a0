# A mesh of two hosts on a machine whose clock says 1970, is set to 2038 and back while they run: they meet, containers
# reach each other throughout, and who is started anew at any of these times comes back in. It sets the clock, so it
# wants a machine of its own: make test-clock.
set -eu
# Busybox, whose shell may be what runs this, has an ip and an nsenter that can do less than those in /bin.

on() { # HOST COMMAND...
	keeper=$(cat /tmp/keeper$1)
	shift
	/bin/nsenter -t "$keeper" -m -n -- "$@"
}

in_() { # HOST CONTAINER COMMAND...
	h=$1 c=$2
	shift 2
	on "$h" /bin/nsenter --net=/run/netns/"$c" "$@"
}

fail() {
	echo "FAILED: $*"
	for n in 1 2; do
		echo "h$n:"
		on $n meshctl status connections || :
		on $n tail -n 30 /var/log/meshd.log || :
	done
	exit 1
}

clock() { # SECONDS YEAR: sets the clock
	[ "$1" = as-is ] || date -u -s "$1" >/dev/null
	[ "$(date -u +%Y)" = "$2" ] || fail "the clock says $(date -u), not $2"
	echo "the clock says $(date -u), after $(cut -d' ' -f1 /proc/uptime) s"
}

launch() { # HOST ARGUMENTS...
	on "$1" env MESH_PASSWORD="$password" meshctl launch $([ "$1" = 1 ] || echo 192.0.2.1) >/dev/null || fail "h$1 is not launched"
}

reach() { # HOST CONTAINER ADDRESS: within 20 s, and then five times without a loss
	for _ in $(seq 20); do
		in_ "$1" "$2" ping -c 1 -W 1 "$3" >/dev/null 2>&1 && break
	done
	in_ "$1" "$2" ping -c 5 -W 2 "$3" | grep -q '5 packets received' || fail "$2 does not reach $3"
}

container() { # HOST NAME ADDRESS
	on "$1" /bin/ip netns add "$2"
	on "$1" meshctl attach "$3" netns:/run/netns/"$2" >/dev/null || fail "$2 is not attached"
	on "$1" meshctl dns-add "${3%/*}" -h "$2.mesh.internal" || fail "$2 gets no name"
}

again() { # HOST: dies and is started anew
	pid=$(on "$1" cat /run/meshd/meshd.pid)
	kill -9 "$pid"
	while [ -d /proc/"$pid" ]; do sleep 0.1; done
	launch "$1"
}

named() { # HOST NAME ADDRESS
	for _ in $(seq 100); do
		[ "$(on "$1" meshctl dns-lookup "$2")" = "$3" ] && return
		sleep 0.2
	done
	fail "on h$1 the name $2 is not $3"
}

step() { # SECONDS YEAR: sets the clock while a container pings another, and nothing is lost
	in_ 1 a ping -c 40 -i 0.2 -W 2 10.2.1.2 >/tmp/pings &
	sleep 1
	clock "$@"
	wait $! || :
	grep ' received' /tmp/pings
	grep -q ', 0% packet loss' /tmp/pings || fail "pings were lost while the clock was set"
}

both() { # all of it at this time, with a container that comes new
	reach 1 a 10.2.1.2
	reach 2 b 10.2.1.1
	again 2
	reach 1 a 10.2.1.2
	again 1
	reach 2 b 10.2.1.1
	last=$((last + 1))
	container 2 c$last 10.2.1.$last/24
	reach 1 a 10.2.1.$last
	named 1 c$last 10.2.1.$last
	got=$(on 1 meshctl attach netns:/run/netns/a) && [ -n "$got" ] || fail "no address from the range"
	on 1 meshctl detach net:default netns:/run/netns/a >/dev/null || fail "$got is not given back"
	echo "all reach each other, also after both were killed; c$last and an address from the range are new"
}

clock as-is 1970
mkdir -p /var
for password in "" "the same on both hosts"; do
	echo "password: $password"
	for n in 1 2; do
		/bin/ip netns add h$n
		/bin/nsenter --net=/run/netns/h$n unshare -m sh -c 'mount -t sysfs none /sys; mount -t bpf none /sys/fs/bpf
			mount -t tmpfs none /run; mount -t tmpfs none /var; mkdir /var/log /var/lib; echo $$ >/tmp/keeper'$n'; exec sleep 100000' >/dev/null 2>&1 &
	done
	sleep 2
	/bin/ip link add eth0 netns h1 type veth peer name eth0 netns h2
	for n in 1 2; do
		on $n /bin/ip link set lo up
		on $n /bin/ip addr add 192.0.2.$n/24 dev eth0
		on $n /bin/ip link set eth0 up
	done
	launch 1
	launch 2
	last=10
	container 1 a 10.2.1.1/24
	container 2 b 10.2.1.2/24
	both
	step 2038-02-01 2038
	both
	step @1000 1970
	both
	step 2026-02-01 2026
	step @2000 1970
	for n in 1 2; do
		on $n meshctl reset --force || fail "h$n: no reset"
		kill "$(cat /tmp/keeper$n)"
		/bin/ip netns del h$n
	done
	clock @3000 1970
done
echo "clock: ok"
