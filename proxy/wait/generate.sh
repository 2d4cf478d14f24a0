#!/bin/sh
# Compiles wait.c for every processor that meshd is built for. Needs clang and lld.
set -eu
cd "$(dirname "$0")"
for arch in amd64:x86_64 arm64:aarch64; do
	clang --target="${arch#*:}-linux-gnu" -std=c11 -Os -Wall -Wextra -Werror -ffreestanding -nostdlib -static \
		-fno-stack-protector -fno-pic -fno-builtin -fno-asynchronous-unwind-tables -Qunused-arguments \
		-fuse-ld=lld -Wl,--build-id=none -Wl,-s -Wl,-z,noexecstack \
		-o "wait_${arch%:*}" src/wait.c
done
