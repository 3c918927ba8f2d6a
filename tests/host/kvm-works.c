// SPDX-License-Identifier: Apache-2.0
//
// Exits 0 if /dev/kvm runs an ordinary guest, 1 with a reason on stderr if not.
//
// Some hosts offer a /dev/kvm that creates VMs and vCPUs, but whose software
// virtualization leaves a guest in ring 3 when it executes `syscall`. No guest
// kernel survives that, and nothing KVM reports gives it away: only running a
// guest does.

#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>
#include <errno.h>

#define DEADLINE_SECONDS 2

// Guest-physical layout: everything in the first page-table entry's 2 MiB.
#define PML4 0x1000
#define PDPT 0x2000
#define PD 0x3000
#define GDT 0x4000
#define CODE 0x5000
#define USER_CODE (CODE + 0x40)
#define SYSCALL_ENTRY (CODE + 0x80)
#define STACK 0x8000
#define MEMORY 0x10000

// As STAR wants them: kernel code, kernel data, (unused), user data, user code.
#define KERNEL_CS 0x08
#define KERNEL_SS 0x10
#define SYSRET_BASE 0x13
#define USER_SS 0x1b
#define USER_CS 0x23

#define REPORT_PORT 0xf5

// Ring 0: STAR, LSTAR and SFMASK are set by wrmsr, as a kernel does it, then
// iretq to ring 3.
static const uint8_t kernel_code[] = {
	0xb9, 0x81, 0x00, 0x00, 0xc0,             // mov ecx, IA32_STAR
	0x31, 0xc0,                               // xor eax, eax
	0xba, KERNEL_CS, 0x00, SYSRET_BASE, 0x00, // mov edx, SYSRET_BASE:KERNEL_CS
	0x0f, 0x30,                               // wrmsr
	0xff, 0xc1,                               // inc ecx (IA32_LSTAR)
	0xb8, 0x80, 0x50, 0x00, 0x00,             // mov eax, SYSCALL_ENTRY
	0x31, 0xd2,                               // xor edx, edx
	0x0f, 0x30,                               // wrmsr
	0x6a, USER_SS,                            // push ss
	0x68, 0x00, 0x80, 0x00, 0x00,             // push rsp = STACK
	0x6a, 0x02,                               // push rflags
	0x6a, USER_CS,                            // push cs
	0x68, 0x40, 0x50, 0x00, 0x00,             // push rip = USER_CODE
	0x48, 0xcf,                               // iretq
};
// Ring 3: on return from a `syscall` that was ignored, ud2 ends in a shutdown.
static const uint8_t user_code[] = {
	0x0f, 0x05, // syscall
	0x0f, 0x0b, // ud2
};
// `out` faults in ring 3, so the exit alone proves ring 0; cs is sent as well.
static const uint8_t syscall_entry[] = {
	0x8c, 0xc8,        // mov eax, cs
	0xe6, REPORT_PORT, // out REPORT_PORT, al
	0xf4,              // hlt
};

_Static_assert(sizeof(kernel_code) <= USER_CODE - CODE, "kernel code overlaps user code");
_Static_assert(SYSCALL_ENTRY == 0x5080 && USER_CODE == 0x5040, "addresses in the machine code");

static void no(const char *why)
{
	fprintf(stderr, "/dev/kvm does not work: %s\n", why);
	exit(1);
}

static void no_errno(const char *what)
{
	fprintf(stderr, "/dev/kvm does not work: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void on_deadline(int signal)
{
	static const char message[] = "/dev/kvm does not work: the guest made no progress\n";
	(void)signal;
	if (write(STDERR_FILENO, message, sizeof(message) - 1) < 0)
		_exit(2);
	_exit(1);
}

static void fill_memory(uint8_t *memory)
{
	const uint64_t present_write_user = 0x7, large = 0x80;
	const uint64_t gdt[] = {
		0,
		0x00af9b000000ffff, // 0x08 ring 0 code, long mode
		0x00cf93000000ffff, // 0x10 ring 0 data
		0,
		// 0x18 is where SYSRET takes ss from, 0x20 cs.
	};
	const uint64_t user[] = { 0x00cff3000000ffff, 0x00affb000000ffff };

	*(uint64_t *)(memory + PML4) = PDPT | present_write_user;
	*(uint64_t *)(memory + PDPT) = PD | present_write_user;
	*(uint64_t *)(memory + PD) = 0 | present_write_user | large;
	memcpy(memory + GDT, gdt, sizeof(gdt));
	memcpy(memory + GDT + 0x18, user, sizeof(user));
	memcpy(memory + CODE, kernel_code, sizeof(kernel_code));
	memcpy(memory + USER_CODE, user_code, sizeof(user_code));
	memcpy(memory + SYSCALL_ENTRY, syscall_entry, sizeof(syscall_entry));
}

static void set_registers(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK, .rflags = 2 };
	struct kvm_segment code = {
		.base = 0, .limit = 0xffffffff, .selector = KERNEL_CS,
		.type = 11, .present = 1, .s = 1, .l = 1, .g = 1,
	};
	struct kvm_segment data = {
		.base = 0, .limit = 0xffffffff, .selector = KERNEL_SS,
		.type = 3, .present = 1, .s = 1, .db = 1, .g = 1,
	};

	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		no_errno("KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 5 * 8 - 1;
	sregs.cr3 = PML4;
	sregs.cr4 = 0x20;        // PAE
	sregs.cr0 = 0x80000011;  // PG, ET, PE
	sregs.efer = 0x501;      // LMA, LME, SCE
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0)
		no_errno("KVM_SET_SREGS");
	if (ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
		no_errno("KVM_SET_REGS");
}

// Without a CPUID of its own the guest has no long mode on some hosts.
static void set_cpuid(int kvm, int vcpu)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };

	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) < 0)
		no_errno("KVM_GET_SUPPORTED_CPUID");
	if (ioctl(vcpu, KVM_SET_CPUID2, &cpuid) < 0)
		no_errno("KVM_SET_CPUID2");
}

int main(void)
{
	// The signal ends a KVM_RUN that does not return by itself.
	struct sigaction action = { .sa_handler = on_deadline };
	struct itimerval deadline = { .it_value.tv_sec = DEADLINE_SECONDS };
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &deadline, NULL);

	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		no_errno("open");
	if (ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
		no("unknown API version");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		no_errno("KVM_CREATE_VM");
	// Intel hosts without unrestricted guest want these, others ignore them.
	ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000);

	uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		no_errno("mmap of guest memory");
	fill_memory(memory);
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY,
		.userspace_addr = (uintptr_t)memory,
	};
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		no_errno("KVM_SET_USER_MEMORY_REGION");

	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		no_errno("KVM_CREATE_VCPU");
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < (int)sizeof(struct kvm_run))
		no_errno("KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		no_errno("mmap of kvm_run");
	set_cpuid(kvm, vcpu);
	set_registers(vcpu);

	if (ioctl(vcpu, KVM_RUN, 0) < 0)
		no_errno("KVM_RUN");

	struct kvm_regs regs;
	if (run->exit_reason == KVM_EXIT_IO && run->io.port == REPORT_PORT &&
	    run->io.direction == KVM_EXIT_IO_OUT) {
		uint8_t cs = *((uint8_t *)run + run->io.data_offset);
		if (cs == KERNEL_CS)
			return 0;
		no("syscall from ring 3 does not arrive in ring 0");
	}
	if (ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip >= SYSCALL_ENTRY &&
	    regs.rip < SYSCALL_ENTRY + sizeof(syscall_entry))
		no("syscall from ring 3 does not arrive in ring 0");
	fprintf(stderr, "/dev/kvm does not work: a tiny guest ends with exit reason %u\n",
		run->exit_reason);
	return 1;
}
