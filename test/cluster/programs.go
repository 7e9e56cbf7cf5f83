package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Programs are what a cluster needs that is not of the distribution.
type Programs struct {
	Kube   string // Kubernetes
	Helm   string
	Images []string // archives of PauseImage and WorkloadImage
}

// Build builds them, into dir but for Kubernetes, which has a cache.
func Build(ctx context.Context, dir string) (p Programs, err error) {
	module, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", "bauta.dev/bauta")
	if err != nil {
		return p, err
	}
	if p.Kube, err = output(ctx, module, "test/cluster/kube/build"); err != nil {
		return p, err
	}
	tools, err := output(ctx, module, "tools/helm/build")
	if err != nil {
		return p, err
	}
	p.Helm = filepath.Join(tools, "helm")
	workload := filepath.Join(dir, "workload")
	if _, err := output(ctx, module, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", workload, "./test/cluster/workload"); err != nil {
		return p, err
	}
	for _, image := range [][]string{{PauseImage, "pause"}, {WorkloadImage, "serve"}} {
		path := filepath.Join(dir, image[1]+".tar")
		if err := WriteImage(path, image[0], workload, image[1]); err != nil {
			return p, err
		}
		p.Images = append(p.Images, path)
	}
	return p, nil
}

// BautaImage builds the image that is tested, as bauta.test/bauta:VERSION, or its
// variant with the tools of iptables mode, and returns the path of its archive.
func BautaImage(ctx context.Context, dir, version string, iptables bool) (string, error) {
	module, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", "bauta.dev/bauta")
	if err != nil {
		return "", err
	}
	tag, variant := version, "ebpf"
	if iptables {
		tag, variant = version+"-iptables", "iptables"
	}
	path := filepath.Join(dir, "bauta-"+tag+".tar")
	_, err = output(ctx, module, "go", "run", "./packaging/image", "-o", path, "-version", version,
		"-variant", variant, "-ref", "bauta.test/bauta:"+tag)
	return path, err
}

// output runs a program with static linking and returns what it prints.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	if !filepath.IsAbs(name) && strings.Contains(name, "/") {
		name = filepath.Join(dir, name)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
