/* SPDX-License-Identifier: Apache-2.0 */
/* From the PVH entry (32-bit protected mode, ebx: start info) to 64-bit C with the first 4 GiB mapped one to one; and the
 * way there for further processors, which begin in real mode at the page TRAMPOLINE. */

    .section .note.pvh, "a", @note
    .long 4, 4, 18          /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long entry

    .set TRAMPOLINE, 0x8000
    .set CODE64, 0x08
    .set DATA, 0x10
    .set CODE32, 0x18

    .text
    .code32
    .globl entry
entry:
    cli
    movl $boot_stack_end, %esp
    movl %ebx, start_info
    /* Page tables: 2 MiB pages; only the boot CPU fills them. */
    movl $pml4, %edi
    movl $pdpt + 3, (%edi)
    movl $pdpt, %edi
    movl $page_directories + 3, %eax
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b
    movl $page_directories, %edi
    movl $0x83, %eax
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b
    movl $main, %esi
    jmp long_mode

    /* esi: where to go. */
long_mode:
    lgdt gdt_pointer
    movl $0x20, %eax        /* CR4.PAE */
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx  /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax   /* CR0.PG, CR0.PE */
    movl %eax, %cr0
    ljmp $CODE64, $3f
    .code64
3:  movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %esi, %esi
    callq *%rsi
4:  hlt
    jmp 4b

    .code32
second_protected:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $second_stack_end, %esp
    movl $second, %esi
    jmp long_mode

    /* Copied to TRAMPOLINE. */
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt - trampoline
    movl $0x11, %eax        /* CR0.ET, CR0.PE */
    movl %eax, %cr0
    ljmpl $CODE32, $second_protected
    .balign 8
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .data
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .globl start_info
start_info:
    .long 0

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
page_directories: .skip 4 * 4096
    .skip 16384
boot_stack_end:
    .skip 16384
second_stack_end:

    .section .note.GNU-stack, "", @progbits
