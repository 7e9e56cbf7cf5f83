# Every target has a help line; `make help` prints them.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOFLAGS_BUILD = -trimpath -ldflags "-s -w -X bauta.dev/bauta/internal/cli.version=$(VERSION)"
# The packages whose tests need root and a kernel; all others are unprivileged.
ROOT_PACKAGES = ./internal/agent/... ./internal/datapath/... ./internal/devices/... ./internal/iptables/... ./internal/lab/... ./internal/demo/... $$(go list ./test/... | grep -v /test/cluster)
export CGO_ENABLED = 0

.DEFAULT_GOAL := build
.PHONY: help build image chart generate check lint test test-cluster kernels fuzz bench demo ci ci-full ci-generated

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## the static binary ./bauta
	@tools/need demo
	go build -buildvcs=auto $(GOFLAGS_BUILD) -o bauta ./cmd/bauta

image: ## OCI archives in dist/: both variants, both architectures, with SBOMs
	@tools/need image
	@mkdir -p dist
	for variant in ebpf iptables; do for arch in amd64 arm64; do \
		go run ./packaging/image -o dist/bauta-$$variant-$$arch.tar -variant $$variant -arch $$arch -version "$(VERSION)" || exit 1; done; done

chart: ## the Helm chart: its tests, and dist/bauta-VERSION.tgz (builds helm the first time: 3 minutes of CPU)
	@tools/need demo
	@tools/helm/build >/dev/null
	go test -count=1 ./test/chart
	tools/helm/package "$(VERSION)" dist

demo: build ## the main job, proved in network namespaces on this machine (root, 20 s)
	./bauta demo

test: check ## everything: unit, program and lab tests (root, under 10 minutes)
	@tools/need test
	go test -count=1 -timeout 9m $(ROOT_PACKAGES)
	# The suite once more in iptables mode: 40 s for each backend.
	BAUTA_E2E_MODE=iptables-nft go test -count=1 -timeout 5m ./test/e2e
	BAUTA_E2E_MODE=iptables-legacy go test -count=1 -timeout 5m ./test/e2e

check: ## what needs no privileges: vet, lint, unit tests (under 1 minute)
	@tools/need demo
	go vet ./...
	go test -count=1 $$(go list ./... | grep -vE 'internal/(agent|datapath|devices|iptables|lab|demo)|/test/')

lint: ## gofmt, vet for arm64, staticcheck, clang-format, shellcheck
	@tools/need lint
	@test -z "$$(gofmt -l cmd internal packaging test)" || { gofmt -l cmd internal packaging test; echo "run gofmt -w on these"; exit 1; }
	GOARCH=arm64 go vet ./cmd/... ./internal/... ./packaging/...
	go tool -modfile=tools/go.mod staticcheck ./...
	clang-format-19 --dry-run --Werror bpf/*.c bpf/*.h
	shellcheck tools/need tools/helm/build tools/helm/package .ci/run test/cluster/kube/build $(wildcard test/kernels/run test/kernels/fetch)

generate: ## the BPF objects, with the pinned clang
	@tools/need generate
	go generate ./internal/datapath

ci-generated: generate ## proves that the committed objects are what the sources give
	git diff --exit-code -- internal/datapath docs

# What differs with another CNI plugin and another mode of kube-proxy.
CLUSTER_VARIANT = TestNodesAreReady|TestWorld|TestInside|TestHost|TestClusterIP|TestNodePort|TestModes|TestAgentKilled|TestNodeRebooted
test-cluster: ## a real Kubernetes with two nodes and the chart, in two variants (root; 9 minutes, the first time 10 more)
	@tools/need image
	@tools/need cluster
	test/cluster/kube/build
	tools/helm/build
	go test -count=1 -timeout 15m ./test/cluster/...
	go test -count=1 -timeout 10m -run '$(CLUSTER_VARIANT)' ./test/cluster -args -cni bridge -proxy nftables

kernels: ## program and lab suites, the demo and some of e2e on 5.10, 6.1, 6.12 and the newest kernel in QEMU (root, up to 50 minutes)
	@tools/need kernels
	test/kernels/run

FUZZTIME ?= 10m
fuzz: ## each fuzz test of the programs for FUZZTIME, one after the other (root)
	for t in FuzzEgress FuzzIngress FuzzICMPError FuzzSequence; do \
		go test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x -parallel 1 ./internal/datapath || exit 1; done

bench: ## ns per packet of the programs (root)
	go test -run '^$$' -bench . -benchtime 1x -count 5 -timeout 30m ./internal/datapath

ci: lint test chart ci-generated ## what CI runs

ci-full: ci test-cluster ## that, and a real Kubernetes
