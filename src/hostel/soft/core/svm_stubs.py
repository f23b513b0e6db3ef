"""The host instructions that we add to unicorn, as source and as bytes.

They share one page of data, ``shared`` (``svm_host.Shared``), 4 KiB after their first byte. The test beside
this file assembles ``SOURCE`` and compares: there is no assembler on a user's machine.

Offsets in a TranslationBlock: pc 0, cs_base 8, icount 0x16, code and its size 0x20 and 0x28. After the code
stands, for each instruction, the step of its pc, of its flags operation and of its host pc, in SLEB128: so
it is known which instruction an address is.
"""

from __future__ import annotations

SOURCE = """\
.intel_syntax noprefix
.set BUDGET,0
.set KICK,8
.set STOPPED,12
.set TB,16
.set EXIT,24
.set ADDRESS,32
.set ACCESS,40
.set INDEX,44
.set FILLS,48
.set EVENTS,56
.set KIND,64
.set VECTOR,68
.set PORT,72
.set SIZE,76
.set ENV,80
.set CPU,88
.set DO_INTERRUPT,96
.set HARDIRQ,104
.set VMEXIT,112
.set EMU_STOP,120
.set TLB_FILL,128
.set EXEC_INTERRUPT,136
.set CODE_PAGES,144
.set NO_EXECUTE,152
.set FLUSH,160
.set PATIENCE,168
.set ROOT,176
.set BEFORE,184
.set shared, start+0x1000
start:
# UC_HOOK_INTR(uc, index, _): what has not run of the block is given back, then exception or exit
intr:
 push rbx
 lea rbx,[rip+shared]
 mov r8,[rbx+TB]
 test r8,r8
 jz 2f
 mov r9,[r8+0x20]
 add r9,[r8+0x28]
 movzx ecx, word ptr [r8+0x16]
 mov r10,[r8]
 mov r11,[rbx+ENV]
 mov rax,[r11+0x80]
 add rax,[r8+8]
1: movzx edx, byte ptr [r9]
 add r10,rdx
 inc r9
3: test byte ptr [r9],0x80
 lea r9,[r9+1]
 jnz 3b
4: test byte ptr [r9],0x80
 lea r9,[r9+1]
 jnz 4b
 cmp r10,rax
 je 5f
 dec ecx
 jnz 1b
5: mov qword ptr [rbx+TB],0
 add [rbx+BUDGET], rcx
2: cmp esi, 0x100
 jae 6f
 inc qword ptr [rbx+EVENTS]
 mov rdi,[rbx+CPU]
 call [rbx+DO_INTERRUPT]
 jmp 7f
6: mov eax, esi
 mov [rbx+EXIT], rax
 mov rax,[rbx+CPU]
 mov dword ptr [rax+0x1c],0
 call [rbx+EMU_STOP]
7: mov rax,[rbx+ENV]
 mov dword ptr [rax+0x150c],0
 pop rbx
 ret
.p2align 4
# UC_HOOK_INSN IN and OUT(uc, port, size, …): unicorn never asks the permission maps, so each one exits
io:
 lea rax,[rip+shared]
 mov [rax+PORT],esi
 mov [rax+SIZE],edx
 mov esi,0x7b
 jmp 1f
.p2align 4
# UC_HOOK_INSN SYSCALL, SYSENTER(uc, _): unicorn leaves both to us
syscall:
 lea rax,[rip+shared]
 mov esi,0x4f0
 jmp 1f
.p2align 4
sysenter:
 lea rax,[rip+shared]
 mov esi,0x4f1
1: mov rdi,[rax+ENV]
 xor edx,edx
 xor ecx,ecx
 jmp [rax+VMEXIT]
.p2align 4
# tlb_fill(cpu, address, size, access, index, probe, from): the walk is QEMU's. Which linear address it was,
# #VMEXIT(NPF) does not say. A page is executable in the TLB only once code was fetched from it, for QEMU
# suspects each write to an executable page of changing code; then all is flushed, so that no other entry
# writes there unseen. CR3 changes by a task switch, which nothing intercepts; the TLB is flushed then, so the
# next access comes by here: it must not walk tables of the guest's choice. And the TLB is flushed after many
# misses for its size: only then QEMU doubles it.
fill:
 push rbx
 push rbp
 push r12
 push r13
 push r14
 lea rbx,[rip+shared]
 mov [rbx+ADDRESS],rsi
 mov [rbx+ACCESS],ecx
 mov [rbx+INDEX],r8d
 inc qword ptr [rbx+FILLS]
 mov rax,[rbx+ROOT]
 cmp rax,-1
 je 8f
 mov r10,[rbx+ENV]
 cmp rax,[r10+0x1c0]
 jne 9f
8: mov rbp,rsi
 mov r12d,ecx
 mov r13d,r8d
 mov r14d,r9d
 cmp ecx,2
 jne 1f
 mov rax,[rbx+TB]
 mov [rbx+BEFORE],rax
 mov qword ptr [rbx+TB],0
1: dec qword ptr [rbx+PATIENCE]
 jnz 7f
 mov rdi,[rbx+CPU]
 call [rbx+FLUSH]
 mov rdx,r13
 shl rdx,4
 add rdx,[rbx+CPU]
 mov rax,[rdx+0x8a10]
 shr rax,6
 inc rax
 shl rax,3
 cmp rax,0x20000
 jb 6f
 shl rax,30
6: mov [rbx+PATIENCE],rax
7: mov rdi,[rbx+CPU]
 mov rsi,rbp
 xor edx,edx
 mov ecx,r12d
 mov r8d,r13d
 mov r9d,r14d
 sub rsp,8
 push qword ptr [rsp+56]
 call [rbx+TLB_FILL]
 add rsp,16
 test al,al
 jz 4f
 mov rdx,r13
 shl rdx,4
 add rdx,[rbx+CPU]
 mov rax,rbp
 shr rax,12
 shl rax,6
 and rax,[rdx+0x8a10]
 add rax,[rdx+0x8a18]
 mov rcx,[rax+24]
 shr rcx,12
 mov r8,[rbx+CODE_PAGES]
 cmp r12d,2
 je 2f
 bt [r8],rcx
 jc 3f
 mov qword ptr [rax+16],-1
 jmp 3f
2: mov r9,[rbx+NO_EXECUTE]
 bt [r9],rcx
 jc 5f
 bts [r8],rcx
 jc 3f
 mov rdi,[rbx+CPU]
 call [rbx+FLUSH]
 jmp 1b
3: mov eax,1
4: pop r14
 pop r13
 pop r12
 pop rbp
 pop rbx
 ret
5: mov qword ptr [rax+16],-1
 mov rdi,[rbx+ENV]
 mov esi,0x400
 mov edx,0x15
 mov rcx,[rsp+48]
 call [rbx+VMEXIT]
9: mov qword ptr [rbx+TB],0
 mov rdi,r10
 mov esi,0x4f2
 xor edx,edx
 mov rcx,[rsp+48]
 call [rbx+VMEXIT]
.p2align 4
# cpu_exec_interrupt(cpu, request): deliver an event before the first instruction
inject:
 push rbx
 lea rbx,[rip+shared]
 mov qword ptr [rbx+TB],0
 mov eax,[rbx+KIND]
 test eax,eax
 jz 9f
 mov dword ptr [rbx+KIND],0
 and dword ptr [rdi+0x1c], ~2
 inc qword ptr [rbx+EVENTS]
 cmp eax,1
 jne 2f
 mov rdi,[rbx+ENV]
 mov esi,[rbx+VECTOR]
 mov edx,1
 call [rbx+HARDIRQ]
 jmp 3f
2: mov ecx,[rbx+VECTOR]
 mov [rdi+0x81a0], ecx
 call [rbx+DO_INTERRUPT]
3: mov rax,[rbx+ENV]
 mov dword ptr [rax+0x150c],0
 mov eax,1
 pop rbx
 ret
9: mov rax,rbx
 pop rbx
 jmp [rax+EXEC_INTERRUPT]
"""

ENTRY = {
    "intr": 0,
    "io": 160,
    "syscall": 192,
    "sysenter": 208,
    "fill": 240,
    "inject": 624,
}

CODE = bytes.fromhex(
    "53488d1df80f00004c8b43104d85c074514d8b48204d034828410fb748164d8b104c8b5b50498b838000000049034008"
    "410fb6114901d249ffc141f601804d8d490175f641f601804d8d490175f64939c27404ffc975d948c743100000000048"
    "010b81fe00010000730d48ff4338488b7b58ff5360eb1489f048894318488b4358c7401c00000000ff5378488b4350c7"
    "800c150000000000005bc30f1f440000488d05590f000089704889504cbe7b000000eb2866662e0f1f84000000000090"
    "488d05390f0000bef0040000eb0e6690488d05290f0000bef1040000488b785031d231c9ff6070660f1f840000000000"
    "5355415441554156488d1d010f000048897320894b284489432c48ff4330488b83b00000004883f8ff74114c8b535049"
    "3b82c00100000f85260100004889f54189cc4589c54589ce83f9027513488b4310488983b800000048c7431000000000"
    "48ff8ba8000000753a488b7b58ff93a00000004c89ea48c1e20448035358488b82108a000048c1e80648ffc048c1e003"
    "483d00000200720448c1e01e488983a8000000488b7b584889ee31d24489e14589e84589f14883ec08ff742438ff9380"
    "0000004883c41084c074704c89ea48c1e204480353584889e848c1e80c48c1e006482382108a0000480382188a000048"
    "8b481848c1e90c4c8b83900000004183fc027410490fa308722c48c74010ffffffffeb224c8b8b98000000490fa30972"
    "23490fab08720f488b7b58ff93a0000000e92affffffb801000000415e415d415c5d5bc348c74010ffffffff488b7b50"
    "be00040000ba15000000488b4c2430ff537048c74310000000004c89d7bef204000031d2488b4c2430ff53700f1f4000"
    "53488d1d880d000048c74310000000008b434085c07446c743400000000083671cfd48ff433883f8017511488b7b508b"
    "7344ba01000000ff5368eb0c8b4b44898fa0810000ff5360488b4350c7800c15000000000000b8010000005bc34889d8"
    "5bffa088000000"
)
