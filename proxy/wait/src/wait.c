// SPDX-License-Identifier: Apache-2.0
//
// wait IFNAME COMMAND [ARG...]
//
// The first process of a container that is to join the mesh: it waits until the interface IFNAME is up and
// has carrier, which the host gives it last, after addresses and routes, and then becomes COMMAND. It is
// freestanding so that it runs in an image that holds nothing, as any user, on a read-only root and without
// /proc or /sys. SIGTERM, SIGINT and SIGQUIT end the waiting, as process 1 would otherwise never hear them.
//
// Exit status: 125 used wrongly, 126 COMMAND cannot be run, 127 COMMAND not found, 128+n ended by signal n.

typedef unsigned long u64;
typedef long s64;

#if defined(__x86_64__)
enum { SYS_write = 1, SYS_close = 3, SYS_sigprocmask = 14, SYS_ioctl = 16, SYS_socket = 41, SYS_execve = 59, SYS_exit = 60, SYS_sigtimedwait = 128 };

static s64 sys(s64 n, s64 a, s64 b, s64 c, s64 d)
{
	s64 ret;
	register s64 r10 __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return ret;
}

__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall start\n");
#elif defined(__aarch64__)
enum { SYS_ioctl = 29, SYS_close = 57, SYS_write = 64, SYS_exit = 93, SYS_sigprocmask = 135, SYS_sigtimedwait = 137, SYS_socket = 198, SYS_execve = 221 };

static s64 sys(s64 n, s64 a, s64 b, s64 c, s64 d)
{
	register s64 x8 __asm__("x8") = n;
	register s64 x0 __asm__("x0") = a;
	register s64 x1 __asm__("x1") = b;
	register s64 x2 __asm__("x2") = c;
	register s64 x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}

__asm__(".globl _start\n_start:\n\tmov x29,#0\n\tmov x0,sp\n\tbl start\n");
#else
#error "no system call interface for this processor"
#endif

enum {
	AF_INET = 2, SOCK_DGRAM_CLOEXEC = 2 | 02000000,
	SIOCGIFFLAGS = 0x8913, IFF_UP = 0x1, IFF_RUNNING = 0x40,
	SIG_BLOCK = 0, SIG_SETMASK = 2,
	SIGINT = 2, SIGQUIT = 3, SIGTERM = 15,
	ENOENT = 2, EACCES = 13, ENOTDIR = 20,
	PATH_MAX = 4096,
};

struct ifreq { char name[16]; short flags; char pad[22]; };
struct timespec { s64 sec, nsec; };

static u64 length(const char *s)
{
	u64 n = 0;
	while (s[n])
		n++;
	return n;
}

static void say(const char *s) { sys(SYS_write, 2, (s64)s, length(s), 0); }

static void fail(int status, const char *what, const char *why)
{
	say("mesh wait: exec: \"");
	say(what);
	say("\": ");
	say(why);
	say("\n");
	sys(SYS_exit, status, 0, 0, 0);
}

static int ready(int fd, const char *name)
{
	struct ifreq r = {0};
	u64 i;

	for (i = 0; i < sizeof r.name - 1 && name[i]; i++)
		r.name[i] = name[i];
	if (sys(SYS_ioctl, fd, SIOCGIFFLAGS, (s64)&r, 0) < 0)
		return 0;
	return (r.flags & (IFF_UP | IFF_RUNNING)) == (IFF_UP | IFF_RUNNING);
}

// await returns when the interface is ready; a signal that asks to end ends the process.
static void await(const char *name)
{
	u64 ends = 1UL << (SIGINT - 1) | 1UL << (SIGQUIT - 1) | 1UL << (SIGTERM - 1), before = 0;
	int fd = sys(SYS_socket, AF_INET, SOCK_DGRAM_CLOEXEC, 0, 0);
	u64 round;

	if (fd < 0)
		return; // no IPv4 here at all: nothing to wait for
	sys(SYS_sigprocmask, SIG_BLOCK, (s64)&ends, (s64)&before, 8);
	for (round = 0; !ready(fd, name); round++) {
		// 5 ms at first, so that a start costs no more; 100 ms after ten seconds.
		struct timespec pause = {0, round < 2000 ? 5000000 : 100000000};
		s64 sig = sys(SYS_sigtimedwait, (s64)&ends, 0, (s64)&pause, 8);

		if (sig > 0)
			sys(SYS_exit, 128 + sig, 0, 0, 0);
	}
	sys(SYS_sigprocmask, SIG_SETMASK, (s64)&before, 0, 8);
	sys(SYS_close, fd, 0, 0, 0);
}

static const char *search_path(char **env)
{
	for (; *env; env++)
		if ((*env)[0] == 'P' && (*env)[1] == 'A' && (*env)[2] == 'T' && (*env)[3] == 'H' && (*env)[4] == '=')
			return *env + 5;
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

// run replaces this process by argv[0], looked up in PATH unless it has a slash (execvp(3)).
static void run(char **argv, char **env)
{
	static char path[PATH_MAX];
	const char *dir = search_path(env), *p;
	u64 len = length(argv[0]), n, i;
	s64 err, denied = 0;

	for (p = argv[0]; *p; p++) {
		if (*p != '/')
			continue;
		err = -sys(SYS_execve, (s64)argv[0], (s64)argv, (s64)env, 0);
		if (err == ENOENT || err == ENOTDIR)
			fail(127, argv[0], "no such file or directory");
		fail(126, argv[0], err == EACCES ? "permission denied" : "cannot be executed");
	}
	for (; len; dir += n + 1) {
		for (n = 0; dir[n] && dir[n] != ':'; n++)
			;
		if (n + len + 2 <= sizeof path) {
			for (i = 0; i < n; i++)
				path[i] = dir[i];
			if (n)
				path[n] = '/';
			for (i = 0; i <= len; i++)
				path[n + (n ? 1 : 0) + i] = argv[0][i];
			err = -sys(SYS_execve, (s64)path, (s64)argv, (s64)env, 0);
			if (err != ENOENT && err != ENOTDIR)
				denied = err;
		}
		if (!dir[n])
			break;
	}
	if (denied)
		fail(126, argv[0], denied == EACCES ? "permission denied" : "cannot be executed");
	fail(127, argv[0], "executable file not found in $PATH");
}

__attribute__((used)) void start(u64 *stack)
{
	u64 argc = stack[0];
	char **argv = (char **)(stack + 1), **env = argv + argc + 1;

	if (argc < 3) {
		say("usage: wait IFNAME COMMAND [ARG...]\n");
		sys(SYS_exit, 125, 0, 0, 0);
	}
	await(argv[1]);
	run(argv + 2, env);
}
