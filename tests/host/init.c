// SPDX-License-Identifier: Apache-2.0
//
// PID 1 of the emulated host: loads modules, makes a root of this machine's
// own file system and a throw-away layer, runs one command and carries its
// stdin, stdout, stderr and exit status over a virtio-serial port to
// tests/host/run.
//
// Frames on the port, both ways: one byte of type, four of length (little
// endian), payload.
//   from the host:  S start (see struct start)   I stdin (empty: end)
//   to the host:    H ready   W stdin wanted   O stdout   E stderr
//                   X exit status (one byte)   F failure (text)

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT "/dev/vport0p1"
#define HEADER 5
// A frame fits into one write to a virtio-serial port (32 KiB).
#define CHUNK (32 * 1024 - HEADER)
#define INPUT_MAX (1024 * 1024)
// How long the command's descendants may take to die after SIGKILL.
#define DRAIN_SECONDS 10

static int port = -1;

static void write_all(int fd, const void *data, size_t size)
{
	const char *at = data;
	while (size > 0) {
		ssize_t n = write(fd, at, size);
		if (n < 0 && errno == EAGAIN) {
			struct pollfd wait = { .fd = fd, .events = POLLOUT };
			poll(&wait, 1, -1);
			continue;
		}
		if (n <= 0)
			return;
		at += n;
		size -= n;
	}
}

static size_t put_header(uint8_t *at, char type, uint32_t size)
{
	at[0] = type;
	for (int i = 0; i < 4; i++)
		at[1 + i] = size >> (8 * i);
	return HEADER;
}

static uint32_t frame_size(const uint8_t *header)
{
	return header[1] | header[2] << 8 | header[3] << 16 | (uint32_t)header[4] << 24;
}

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	uint8_t frame[HEADER + 512];
	va_list arguments;

	va_start(arguments, format);
	int size = vsnprintf((char *)frame + HEADER, sizeof(frame) - HEADER, format, arguments);
	va_end(arguments);
	if (size >= (int)(sizeof(frame) - HEADER))
		size = sizeof(frame) - HEADER - 1;
	fprintf(stderr, "init: %.*s\n", size, frame + HEADER);
	if (port >= 0) {
		put_header(frame, 'F', size);
		write_all(port, frame, HEADER + size);
		// tests/host/run ends the emulator when it has read the frame.
		sleep(10);
	}
	reboot(RB_AUTOBOOT); // QEMU runs with -no-reboot
	_exit(1);
}

static void load_modules(void)
{
	char line[256];
	FILE *list = fopen("/modules/list", "re");
	if (!list)
		fail("/modules/list: %m");
	while (fgets(line, sizeof(line), list)) {
		char path[300];
		char *parameters = strchr(line, ' ');
		line[strcspn(line, "\n")] = 0;
		if (parameters)
			*parameters++ = 0;
		snprintf(path, sizeof(path), "/modules/%s.ko", line);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			fail("module %s: %m", line);
		if (syscall(SYS_finit_module, fd, parameters ? parameters : "", 0) < 0 && errno != EEXIST)
			fail("module %s: %m", line);
		close(fd);
		unlink(path); // the initramfs is memory
	}
	fclose(list);
}

static void mount_or_fail(const char *source, const char *target, const char *type,
			  unsigned long flags, const char *data)
{
	if (mount(source, target, type, flags, data) < 0)
		fail("mount of %s on %s: %m", type ? type : source, target);
}

static void switch_root(void)
{
	mkdir("/lower", 0755);
	mkdir("/upper", 0755);
	mkdir("/root", 0755);
	mount_or_fail("root", "/lower", "9p", MS_RDONLY,
		      "trans=virtio,version=9p2000.L,cache=loose,msize=512000");
	mount_or_fail("tmpfs", "/upper", "tmpfs", 0, "mode=755,size=50%");
	mkdir("/upper/data", 0755);
	mkdir("/upper/work", 0755);
	mount_or_fail("overlay", "/root", "overlay", 0,
		      "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work");
	// pivot_root cannot leave an initramfs; this is what switch_root(8) does.
	// Kernel threads share this process's root, so modprobe is found as well.
	if (chdir("/root") < 0)
		fail("chdir to the new root: %m");
	mount_or_fail(".", "/", NULL, MS_MOVE, NULL);
	if (chroot(".") < 0 || chdir("/") < 0)
		fail("chroot: %m");
	mount_or_fail(NULL, "/", NULL, MS_REC | MS_SHARED, NULL);
}

static void mount_directory(const char *type, const char *target, unsigned long flags, const char *data)
{
	mkdir(target, 0755);
	mount_or_fail(type, target, type, flags, data);
}

static void mount_file_systems(void)
{
	const unsigned long secure = MS_NOSUID | MS_NODEV;

	mount_directory("proc", "/proc", secure | MS_NOEXEC, NULL);
	mount_directory("sysfs", "/sys", secure | MS_NOEXEC, NULL);
	mount_directory("devtmpfs", "/dev", MS_NOSUID, "mode=755");
	mount_directory("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_directory("tmpfs", "/dev/shm", secure, "mode=1777");
	mount_directory("mqueue", "/dev/mqueue", secure | MS_NOEXEC, NULL);
	mount_directory("tmpfs", "/run", secure, "mode=755,size=25%");
	mkdir("/run/lock", 01777);
	chmod("/run/lock", 01777);
	mount_directory("cgroup2", "/sys/fs/cgroup", secure | MS_NOEXEC, "nsdelegate");
}

static void read_file(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
	if (n < 0)
		fail("%s: %m", path);
	text[n] = 0;
	close(fd);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail("%s: %m", path);
	close(fd);
}

static void enable_controllers(void)
{
	char controllers[512], *rest = controllers, *name;

	read_file("/sys/fs/cgroup/cgroup.controllers", controllers, sizeof(controllers));
	while ((name = strsep(&rest, " \n"))) {
		char enable[64];
		if (!*name)
			continue;
		snprintf(enable, sizeof(enable), "+%s", name);
		write_file("/sys/fs/cgroup/cgroup.subtree_control", enable);
	}
}

static gid_t group_id(const char *name)
{
	char line[4096];
	gid_t gid = 0;
	size_t length = strlen(name);
	FILE *groups = fopen("/etc/group", "re");
	while (groups && fgets(line, sizeof(line), groups)) {
		char *second = strchr(line, ':');
		if (second && (size_t)(second - line) == length && !memcmp(line, name, length)) {
			char *third = strchr(second + 1, ':');
			if (third)
				gid = strtoul(third + 1, NULL, 10);
			break;
		}
	}
	if (groups)
		fclose(groups);
	return gid;
}

// What udev does on other hosts. Opening one of the nodes loads its module.
static void make_device_nodes(void)
{
	static const struct {
		const char *path;
		mode_t mode;
		unsigned minor;
	} nodes[] = {
		{ "/dev/net/tun", 0666, 200 },
		{ "/dev/loop-control", 0660, 237 },
		{ "/dev/vhost-net", 0660, 238 },
		{ "/dev/vhost-vsock", 0660, 241 },
	};
	gid_t kvm = group_id("kvm");

	mkdir("/dev/net", 0755);
	for (size_t i = 0; i < sizeof(nodes) / sizeof(nodes[0]); i++) {
		if (mknod(nodes[i].path, S_IFCHR | nodes[i].mode, makedev(10, nodes[i].minor)) < 0 &&
		    errno != EEXIST)
			fail("%s: %m", nodes[i].path);
		chmod(nodes[i].path, nodes[i].mode);
	}
	if (chown("/dev/kvm", 0, kvm) < 0 || chmod("/dev/kvm", 0660) < 0)
		fail("/dev/kvm: %m");
	chmod("/dev/fuse", 0666);
	if (symlink("/proc/self/fd", "/dev/fd") < 0 || symlink("fd/0", "/dev/stdin") < 0 ||
	    symlink("fd/1", "/dev/stdout") < 0 || symlink("fd/2", "/dev/stderr") < 0)
		fail("links in /dev: %m");
}

static void set_up_network(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request) < 0)
		fail("interface lo: %m");
	request.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		fail("interface lo: %m");
	close(fd);
	if (sethostname("emulated-host", 13) < 0)
		fail("sethostname: %m");
	// So that the name resolves; the file belongs to the throw-away layer.
	FILE *hosts = fopen("/etc/hosts", "ae");
	if (hosts) {
		fputs("127.0.1.1 emulated-host\n", hosts);
		fclose(hosts);
	}
}

static void set_limits(void)
{
	// As systemd sets them on a Debian host.
	struct rlimit files = { .rlim_cur = 1024, .rlim_max = 524288 };
	setrlimit(RLIMIT_NOFILE, &files);
}

// The driver makes the node in its own time after the boot.
static void open_port(void)
{
	int watch = inotify_init1(IN_CLOEXEC);
	if (watch < 0 || inotify_add_watch(watch, "/dev", IN_CREATE) < 0)
		fail("inotify on /dev: %m");
	for (;;) {
		char events[4096];
		struct pollfd wait = { .fd = watch, .events = POLLIN };
		int fd = open(PORT, O_RDWR | O_CLOEXEC);
		if (fd >= 0) {
			port = fd;
			break;
		}
		if (errno != ENOENT)
			fail(PORT ": %m");
		if (poll(&wait, 1, 10000) <= 0 || read(watch, events, sizeof(events)) < 0)
			fail(PORT ": does not appear");
	}
	close(watch);
}

static void read_exactly(void *data, size_t size)
{
	char *at = data;
	while (size > 0) {
		ssize_t n = read(port, at, size);
		if (n <= 0)
			fail("tests/host/run is gone");
		at += n;
		size -= n;
	}
}

// The payload of S: these, each ended by a NUL; then argc arguments, then the
// environment.
struct start {
	char *modules;   // this kernel's module directory in the cache
	char *results;   // directory to mount read-write, or empty
	char *directory; // working directory
	char **arguments;
	char **environment;
};

static struct start read_start(void)
{
	uint8_t header[HEADER];
	struct start start;
	char *strings[4], **vector;
	size_t count = 0, index = 0;

	read_exactly(header, HEADER);
	uint32_t size = frame_size(header);
	if (header[0] != 'S' || size == 0 || size > INPUT_MAX)
		fail("start frame expected");
	char *text = malloc(size);
	if (!text)
		fail("start frame: %m");
	read_exactly(text, size);
	for (uint32_t i = 0; i < size; i++)
		count += text[i] == 0;
	vector = calloc(count + 2, sizeof(*vector));
	if (!vector || count < 5 || text[size - 1])
		fail("start frame is malformed");

	char *at = text;
	for (int i = 0; i < 4; i++, at += strlen(at) + 1)
		strings[i] = at;
	size_t argc = strtoul(strings[3], NULL, 10);
	if (argc < 1 || argc > count - 4)
		fail("start frame is malformed");
	start = (struct start){ strings[0], strings[1], strings[2], vector, vector + argc + 1 };
	for (; at < text + size; at += strlen(at) + 1) {
		vector[index++] = at;
		if (index == argc)
			vector[index++] = NULL;
	}
	return start;
}

static void make_directories(const char *path)
{
	char copy[4096];
	snprintf(copy, sizeof(copy), "%s", path);
	for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = 0;
		mkdir(copy, 0755);
		*slash = '/';
	}
	mkdir(copy, 0755);
}

// Before /tmp is mounted, which may hide the cache.
static void bind_modules(const char *modules)
{
	char target[300];
	struct utsname name;
	uname(&name);
	snprintf(target, sizeof(target), "/lib/modules/%s", name.release);
	make_directories(target);
	mount_or_fail(modules, target, NULL, MS_BIND, NULL);
}

static void mount_results(const char *results)
{
	if (!*results)
		return;
	make_directories(results);
	mount_or_fail("results", results, "9p", 0,
		      "trans=virtio,version=9p2000.L,cache=mmap,access=any,msize=512000");
}

struct relay {
	int input, output[2];    // the command's stdin, stdout and stderr; -1: closed
	uint8_t out[HEADER + CHUNK];
	size_t out_size, out_done;
	uint8_t in[HEADER + INPUT_MAX];
	size_t in_size;          // bytes of the frame being read
	size_t feed_done;        // of a complete stdin frame, bytes given to the command
	bool feeding, wanted;
};

static pid_t spawn(const struct start *start, struct relay *relay)
{
	int in[2], out[2], err[2];
	if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
		fail("pipe: %m");
	pid_t pid = fork();
	if (pid < 0)
		fail("fork: %m");
	if (pid == 0) {
		sigset_t none;
		setsid();
		signal(SIGPIPE, SIG_DFL);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		dup2(in[0], 0);
		dup2(out[1], 1);
		dup2(err[1], 2);
		environ = start->environment;
		execvp(start->arguments[0], start->arguments);
		int status = errno == ENOENT ? 127 : 126;
		fprintf(stderr, "%s: %m\n", start->arguments[0]);
		_exit(status);
	}
	close(in[0]);
	close(out[1]);
	close(err[1]);
	relay->input = in[1];
	relay->output[0] = out[0];
	relay->output[1] = err[0];
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	return pid;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

// Queues what a pipe holds, as one frame.
static void take_output(struct relay *relay, int index)
{
	ssize_t n = read(relay->output[index], relay->out + HEADER, CHUNK);
	if (n <= 0) {
		close_fd(&relay->output[index]);
		return;
	}
	relay->out_done = 0;
	relay->out_size = put_header(relay->out, index == 0 ? 'O' : 'E', n) + n;
}

static void send_output(struct relay *relay)
{
	ssize_t n = write(port, relay->out + relay->out_done, relay->out_size - relay->out_done);
	if (n < 0 && errno != EAGAIN)
		fail("write to " PORT ": %m");
	if (n > 0)
		relay->out_done += n;
	if (relay->out_done == relay->out_size)
		relay->out_done = relay->out_size = 0;
}

// Reads a stdin frame, which may come in pieces.
static void take_input(struct relay *relay)
{
	size_t need = relay->in_size < HEADER ? HEADER : HEADER + frame_size(relay->in);
	ssize_t n = read(port, relay->in + relay->in_size, need - relay->in_size);
	if (n <= 0) {
		if (n < 0 && errno == EAGAIN)
			return;
		fail("tests/host/run is gone");
	}
	relay->in_size += n;
	if (relay->in_size < HEADER)
		return;
	if (relay->in[0] != 'I' || frame_size(relay->in) > INPUT_MAX)
		fail("stdin frame expected");
	if (relay->in_size < HEADER + frame_size(relay->in))
		return;
	relay->feeding = true;
	relay->feed_done = 0;
	if (frame_size(relay->in) == 0)
		close_fd(&relay->input);
}

// Gives the command what was read; a command that closed its stdin loses it.
static void feed_command(struct relay *relay)
{
	size_t size = frame_size(relay->in);
	ssize_t n = write(relay->input, relay->in + HEADER + relay->feed_done, size - relay->feed_done);
	if (n < 0 && errno != EAGAIN)
		close_fd(&relay->input);
	if (n > 0)
		relay->feed_done += n;
	if (relay->feed_done == size) {
		relay->feeding = relay->wanted = false;
		relay->in_size = 0;
	}
}

static int64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

// Runs until the command has ended, everything it left behind is killed and
// all output is on its way. Returns the exit status as a shell would give it.
static uint8_t run(const struct start *start)
{
	static struct relay relay;
	bool ended = false, childless = false;
	uint8_t status = 0;
	int64_t deadline = 0;
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	int signals = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
	pid_t command = spawn(start, &relay);

	for (;;) {
		bool sending = relay.out_size > 0;
		bool drained = relay.output[0] < 0 && relay.output[1] < 0 && childless;
		if (ended && !sending && (drained || now() > deadline))
			return status;
		if (!sending && !relay.wanted && relay.input >= 0 && !ended) {
			relay.out_size = put_header(relay.out, 'W', 0);
			relay.wanted = sending = true;
		}

		struct pollfd wait[] = {
			{ .fd = port, .events = (sending ? POLLOUT : 0) | (relay.feeding ? 0 : POLLIN) },
			{ .fd = signals, .events = POLLIN },
			{ .fd = sending ? -1 : relay.output[0], .events = POLLIN },
			{ .fd = sending ? -1 : relay.output[1], .events = POLLIN },
			{ .fd = relay.feeding ? relay.input : -1, .events = POLLOUT },
		};
		if (poll(wait, 5, ended ? 1000 : -1) < 0)
			fail("poll: %m");

		if (wait[0].revents & POLLOUT)
			send_output(&relay);
		if (wait[0].revents & (POLLIN | POLLHUP) && !relay.feeding)
			take_input(&relay);
		if (wait[4].revents)
			feed_command(&relay);
		for (int i = 0; i < 2; i++)
			if (wait[2 + i].revents && relay.out_size == 0)
				take_output(&relay, i);
		if (wait[1].revents) {
			struct signalfd_siginfo info;
			int result;
			pid_t pid;
			while (read(signals, &info, sizeof(info)) > 0)
				;
			while ((pid = waitpid(-1, &result, WNOHANG)) > 0) {
				if (pid != command)
					continue;
				ended = true;
				status = WIFEXITED(result) ? WEXITSTATUS(result) : 128 + WTERMSIG(result);
				deadline = now() + DRAIN_SECONDS * 1000;
				close_fd(&relay.input);
				kill(-1, SIGKILL);
			}
			childless = pid < 0;
		}
	}
}

// QEMU's threads of all CPUs change flags of the first one without a lock (target/i386/tcg/system/fpu_helper.c,
// cpu_clear_ignne, with each XRSTOR). When the first CPU enters or leaves a guest meanwhile, a flag comes back or gets
// lost: interrupts stay off for good, or a guest is given the host's state. Nothing here runs a guest on that CPU.
static void leave_first_cpu(void)
{
	cpu_set_t others;
	CPU_ZERO(&others);
	for (long cpu = 1; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++)
		CPU_SET(cpu, &others);
	if (sched_setaffinity(0, sizeof(others), &others) < 0)
		fail("sched_setaffinity: %m");
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	umask(022);
	load_modules();
	switch_root();
	mount_file_systems();
	enable_controllers();
	make_device_nodes();
	set_up_network();
	set_limits();
	leave_first_cpu();
	open_port();

	uint8_t frame[HEADER + 1];
	write_all(port, frame, put_header(frame, 'H', 0));
	struct start start = read_start();
	bind_modules(start.modules);
	mount_directory("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777,size=62%");
	mount_results(start.results);
	if (chdir(start.directory) < 0)
		fail("working directory %s: %m (/tmp, /run and /dev are the emulated host's own)",
		     start.directory);
	fcntl(port, F_SETFL, O_NONBLOCK);
	uint8_t status = run(&start);

	// Results must be on the other side before the emulator is ended.
	if (*start.results && (chdir("/") < 0 || umount2(start.results, 0) < 0))
		sync();
	frame[put_header(frame, 'X', 1)] = status;
	write_all(port, frame, sizeof(frame));
	for (;;)
		pause();
}
