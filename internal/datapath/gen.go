package datapath

// The BPF objects are generated with a pinned compiler and committed, so that a
// normal build needs no clang; `make generate` renews them, CI proves that they
// are reproducible. -idirafter finds asm/types.h, which Debian keeps in a
// directory of the host's architecture; the types in it are the same everywhere.
//
//go:generate go tool bpf2go -go-package datapath -target bpfel -cc clang-19 -strip llvm-strip-19 -cflags "-mcpu=v3 -O2 -g -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu" -type outcome -type addr -type flow -type tuple -type tuple4 -type flow4 -type flow6 -type inbound -type prefix -type rule -type setting -type state -type device -type tunnel -type leak -type leak_count -type counter -type reap_record -type datagram -type fragment -type pod -type share -type refused -type refusal -type stat -type reclaim_state masq ../../bpf/masq.c
