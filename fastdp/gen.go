package fastdp

// Reproduces the committed objects; it needs clang 14 and nothing else from the system.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v3" -type reason bpf bpf/fastdp.c
