package main

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// machines are the architectures an image is made for, with what their binaries say.
var machines = map[string]struct {
	elf     elf.Machine
	variant string // of the platform, as registries list it
}{
	"amd64": {elf.EM_X86_64, ""},
	"arm64": {elf.EM_AARCH64, "v8"},
}

// buildBinary compiles the agent. What could differ between two machines is fixed: paths, Git's
// stamp, the instruction set and the user's own flags.
func buildBinary(ctx context.Context, root, arch string, s source) ([]byte, error) {
	dir, err := os.MkdirTemp("", "bauta-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "bauta")
	const pkg = "bauta.dev/bauta/internal/cli"
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-mod=readonly",
		"-ldflags", fmt.Sprintf("-s -w -buildid= -X %s.version=%s -X %s.commit=%s", pkg, s.version, pkg, s.commit), "-o", out, "./cmd/bauta")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=", "GOAMD64=v1", "GOARM64=v8.0", "GOEXPERIMENT=", "GOWORK=off")
	if _, err := output(cmd); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	if err := checkStatic(b, arch); err != nil {
		return nil, fmt.Errorf("./cmd/bauta: %w", err)
	}
	return b, nil
}
