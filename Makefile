# SPDX-License-Identifier: Apache-2.0
# Each target is a thin line over a script or cargo.
#
#   make run [BUNDLE=dir]   run a container in a microVM; everything needed is set up first
#   make test               set up and run all tests
#   make fuzz TIME=60     fuzz each parser of guest and bundle bytes for so many seconds
#   make bench              compare runtimes
#   make host CMD='…'       run a command on a host with working KVM (RESULTS=dir comes back)
#   make build              binaries and guest files only, under target/
#   make install PREFIX=… DESTDIR=…

PREFIX ?= /usr/local
BUNDLE ?=
TIME ?= 60

.PHONY: build run test fuzz bench host install clean

build:
	@tests/build.sh

run: build
	@tests/run-bundle.sh $(BUNDLE)

test:
	@tests/run-tests.sh

fuzz:
	@tests/fuzz/run.sh $(TIME)

bench: build
	@tests/bench/run.sh

host:
	@tests/host/run $(if $(RESULTS),--results $(RESULTS)) -- sh -c '$(subst ','\'',$(CMD))'

install: build
	install -D -m 0755 target/release/sandbox $(DESTDIR)$(PREFIX)/bin/sandbox
	install -D -m 0644 target/lib/sandbox/vmlinux $(DESTDIR)$(PREFIX)/lib/sandbox/vmlinux
	install -D -m 0644 target/lib/sandbox/initramfs.cpio $(DESTDIR)$(PREFIX)/lib/sandbox/initramfs.cpio

clean:
	cargo clean
