# make help lists the targets.

SHELL    := /bin/bash
GO       ?= go
PREFIX   ?= /usr/local
DESTDIR  ?=
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || cat VERSION 2>/dev/null || echo unreleased)
LDFLAGS  := -s -w -X main.version=$(VERSION)
GOBUILD  := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'

# Packages with tests that start real daemons and dockerds: run one after the other, after the others.
SLOW     := meshd/integration/...
# Time that one fuzz target gets in make fuzz.
FUZZTIME ?= 20s

.PHONY: help build demo deps test test-root test-long integration race fuzz bench bench-quick bench-deps test-kernels test-clock check check-generated generate install uninstall clean need-root

help:
	@echo 'make build        bin/meshd and bin/meshctl, static'
	@echo 'make demo         three hosts on this machine, shown and removed again (root)'
	@echo 'make test         every test, real Docker included (root)'
	@echo 'make test-root    the tests that need root, without real daemons'
	@echo 'make integration  the tests with real daemons and dockerds'
	@echo 'make test-long    make test with long simulations, larger volumes, races and fuzzing'
	@echo 'make race, make fuzz'
	@echo 'make test-kernels the kernel path in other kernels, under qemu (root; fetches Debian packages)'
	@echo 'make test-clock   two hosts whose clock is set from 1970 to 2038 and back, under qemu (the same)'
	@echo 'make bench        the mesh measured beside other networks; make bench-quick, each for a moment;'
	@echo '                  make bench-deps installs the others (root)'
	@echo 'make check        format, vet, staticcheck, import directions, generated files'
	@echo 'make generate     generated files anew (needs clang and llvm)'
	@echo 'make deps         Debian packages that are missing'
	@echo 'make install      into $(PREFIX), with the systemd unit'

build:
	$(GOBUILD) -o bin/ ./cmd/meshd ./cmd/meshctl

need-root:
	@if [ "$$(id -u)" != 0 ]; then echo 'this target makes network namespaces and starts dockerds: run it as root, as in "sudo make $(MAKECMDGOALS)"' >&2; exit 1; fi

demo: need-root deps build
	bin/meshctl demo

# command:package, first those of the demo
LAB    := ip:iproute2 nft:nftables ss:iproute2 sysctl:procps ping:iputils-ping mount:mount
NEEDED := $(LAB) ethtool:ethtool iptables:iptables setpriv:util-linux dockerd:docker.io containerd:containerd runc:runc busybox:busybox-static

demo: NEEDED := $(LAB)

deps: need-root
	@missing=; for pair in $(NEEDED); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	if [ -z "$$missing" ]; then echo 'every Debian package that is needed is there'; \
	else echo "installing$$missing"; apt-get update -qq && \
	  case "$$missing" in *docker.io*) ! apt-cache show docker-cli >/dev/null 2>&1 || missing="$$missing docker-cli";; esac && \
	  printf '#!/bin/sh\nexit 101\n' > /tmp/meshd-policy-rc.d && chmod +x /tmp/meshd-policy-rc.d && \
	  made=; [ -e /usr/sbin/policy-rc.d ] || { cp /tmp/meshd-policy-rc.d /usr/sbin/policy-rc.d; made=1; }; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; code=$$?; \
	  [ -z "$$made" ] || rm -f /usr/sbin/policy-rc.d; rm -f /tmp/meshd-policy-rc.d; exit $$code; fi

test test-root integration test-long: export CGO_ENABLED = 0

test: need-root deps
	$(GO) version; $(GO) vet ./...
	set -x; $(GO) test -timeout 20m $$($(GO) list ./... | grep -v '^meshd/integration')
	set -x; $(GO) test -timeout 40m -count=1 -p 1 $(SLOW)

test-root: need-root deps
	set -x; $(GO) test -timeout 20m -count=1 $$($(GO) list ./... | grep -v '^meshd/integration')

integration: need-root deps
	set -x; $(GO) test -timeout 40m -count=1 -p 1 -v $(SLOW)

test-long: need-root deps race fuzz
	set -x; MESHD_LONG=1 $(GO) test -timeout 90m -count=1 $$($(GO) list ./... | grep -v '^meshd/integration')
	set -x; MESHD_LONG=1 $(GO) test -timeout 90m -count=1 -p 1 $(SLOW)

test-kernels test-clock: NEEDED += qemu-system-x86_64:qemu-system-x86 depmod:kmod cpio:cpio xz:xz-utils
test-kernels: need-root deps
	fastdp/kernels/run.sh $(KERNELS)

test-clock: need-root deps
	fastdp/kernels/run.sh -q '-rtc base=1970-01-01' -s integration/clock.sh 6.12

race:
	set -x; CGO_ENABLED=1 $(GO) test -race -short -timeout 30m $$($(GO) list ./... | grep -v '^meshd/integration')

fuzz:
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
	    echo "$(GO) test -run '^$$' -fuzz ^$$f\$$ -fuzztime $(FUZZTIME) $$p"; \
	    $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
	  done; \
	done

# The mesh beside other ways to carry frames, in turns, with each kind of underlay, then each room's own benchmarks;
# docs/benchmarks.md is made of all of it.
ROOMS := $$($(GO) list ./... | grep -v '^meshd/integration')
bench: need-root deps build
	rm -f bin/bench.json
	set -x; for u in wire 'bare wire' whole; do $(GO) run ./integration/bench -bin bin -results bin/bench.json -underlay "$$u" || exit 1; done
	set -x; $(GO) test -run '^$$' -bench . -benchmem -count 3 -timeout 60m $(ROOMS) >bin/bench.txt || { cat bin/bench.txt; exit 1; }
	$(GO) run ./integration/bench -rounds 0 -results bin/bench.json -gobench bin/bench.txt -out docs

bench-quick: need-root deps build
	set -x; $(GO) run ./integration/bench -bin bin -rounds 1 -length 500ms
	set -x; $(GO) test -run '^$$' -bench . -benchmem -benchtime 50ms -timeout 20m $(ROOMS)

# The networks that the mesh is measured beside, as far as Debian has them; without them bench says what it leaves out.
bench-deps: NEEDED := wireguard-go:wireguard-go wg:wireguard-tools nebula:nebula tincd:tinc edge:n2n perf:linux-perf
bench-deps: deps

check:
	@echo gofmt -l .; files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "not formatted: $$files" >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) test -count=1 .
	$(GO) test -count=1 -run 'Documented|Example' ./cmd/...
	@$(MAKE) --no-print-directory check-generated

# What is generated is what its sources give: made anew and compared, where the compilers are there.
GENERATED := fastdp/bpf_bpfel.go fastdp/bpf_bpfel.o proxy/wait/wait_amd64 proxy/wait/wait_arm64
check-generated:
	@if clang --version 2>/dev/null | grep -q 'version 14\.' && command -v ld.lld >/dev/null && command -v llvm-strip >/dev/null; then \
	  echo 'go generate, and compare'; sums=$$(sha256sum $(GENERATED)) && $(GO) generate ./... && echo "$$sums" | sha256sum --check --quiet; \
	else echo 'clang 14, lld or llvm is not there: generated files are not compared'; fi

generate:
	$(GO) generate ./...

install: build
	install -D -m 0755 bin/meshd $(DESTDIR)$(PREFIX)/bin/meshd
	install -D -m 0755 bin/meshctl $(DESTDIR)$(PREFIX)/bin/meshctl
	install -D -m 0644 packaging/meshd.conf $(DESTDIR)/etc/meshd/meshd.conf.example
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/meshd README.md docs/*.md
	install -d $(DESTDIR)/etc/systemd/system
	sed 's|/usr/local|$(PREFIX)|' packaging/systemd/meshd.service > $(DESTDIR)/etc/systemd/system/meshd.service

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/meshd $(DESTDIR)$(PREFIX)/bin/meshctl $(DESTDIR)/etc/meshd/meshd.conf.example $(DESTDIR)/etc/systemd/system/meshd.service
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/meshd

clean:
	rm -rf bin
