/* The probe's guest: a 64 KiB ROM that takes the place of the firmware. From the reset vector straight into 64-bit mode
 * with paging, then a busy loop with address space switches, then "exit". Assembled (GNU as and ld):
 *   as --32 -o rom.o rom.S && ld -m elf_i386 -Ttext 0xF0000 --oformat binary -o rom.bin rom.o
 * rom.rs holds the bytes; a test runs them under TCG.
 */
        .code16
        .globl _start
_start: cli
        /* from the alias below 4 GiB, where the processor starts, to the one below 1 MiB, which gets mapped below */
        ljmp $0xf000, $(low - _start)
low:
        xor %ax, %ax
        mov %ax, %ds
        movb $'R', %al
        outb %al, $0xe9
        /* identity map of the first 2 MiB: PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000 (RAM starts as zeroes) */
        movl $0x2003, 0x1000
        movl $0x3003, 0x2000
        movl $0x0083, 0x3000
        movl $0x20, %eax            /* CR4.PAE */
        mov %eax, %cr4
        movl $0x1000, %eax
        mov %eax, %cr3
        movl $0xc0000080, %ecx      /* EFER.LME */
        rdmsr
        orw $0x100, %ax
        wrmsr
        lgdtl %cs:(gdt_pointer - _start)
        mov %cr0, %eax
        orl $0x80000001, %eax       /* PG and PE at once: real mode to long mode */
        mov %eax, %cr0
        ljmpl $8, $long_mode
        .code64
long_mode:
        movb $'L', %al
        outb %al, $0xe9
        movl $1000, %ebx
1:      movl $200000, %ecx
2:      decl %ecx
        jnz 2b
        mov %cr3, %rax              /* what a scheduler does: a new address space, and a page flushed */
        mov %rax, %cr3
        invlpg 0x5000
        decl %ebx
        jnz 1b
        movb $0x21, %al
        outb %al, $0xf4             /* isa-debug-exit: QEMU's status is 0x21 * 2 + 1 */
3:      hlt
        jmp 3b
        .balign 8
gdt:    .quad 0
        .quad 0x00209a0000000000
gdt_pointer:
        .word 15
        .long gdt
