package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	return b, checkStatic(b, arch)
}

// checkStatic refuses a binary that another machine or a loader would be needed for.
func checkStatic(b []byte, arch string) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("binary: %w", err)
	}
	defer f.Close()
	if want := machines[arch].elf; f.Machine != want {
		return fmt.Errorf("binary: for %v, want %v", f.Machine, want)
	}
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_INTERP:
			return fmt.Errorf("binary: dynamic, and there is no loader in the image (build with CGO_ENABLED=0)")
		case elf.PT_DYNAMIC:
			libs, err := f.ImportedLibraries()
			if err != nil || len(libs) > 0 {
				return fmt.Errorf("binary: wants the libraries %s, which are not in the image", strings.Join(libs, " "))
			}
		}
	}
	return nil
}
