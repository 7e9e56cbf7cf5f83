package cluster

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"time"
)

// Kubectl runs kubectl as the administrator, with stdin as its input, and returns
// what it prints.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	return c.client(ctx, stdin, c.opts.Kube, append([]string{"kubectl"}, args...)...)
}

// Apply creates or changes objects, given in YAML.
func (c *Cluster) Apply(ctx context.Context, objects string) error {
	_, err := c.Kubectl(ctx, objects, "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// Helm runs helm as the administrator and returns what it prints.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.client(ctx, "", c.opts.Helm, args...)
}

// client runs a client of the API server next to it.
func (c *Cluster) client(ctx context.Context, stdin, program string, args ...string) (string, error) {
	config, err := c.plane.creds.kubeconfig(admin)
	if err != nil {
		return "", err
	}
	var out, warnings strings.Builder
	cmd := exec.CommandContext(ctx, program, args...)
	// Both programs keep caches in the home directory.
	cmd.Env = []string{"KUBECONFIG=" + config, "HOME=" + c.Dir, "PATH=/nowhere"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &warnings
	cmd.WaitDelay = 5 * time.Second
	if err = c.plane.ns.Start(cmd); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s%s", strings.Join(args, " "), err, warnings.String(), out.String())
	}
	return out.String(), nil
}

// Beside runs a program in the network of the control plane, until stop is called or
// the cluster ends. Its output is in the log of the name.
func (c *Cluster) Beside(name, program string, args ...string) (stop func() error, err error) {
	p, err := start(c.plane.ns, c.Dir, name, exec.Command(program, args...))
	if err != nil {
		return nil, err
	}
	c.plane.parts = append(c.plane.parts, p)
	return p.kill, nil
}

// DialBeside connects from the network of the control plane.
func (c *Cluster) DialBeside(ctx context.Context, network, address string) (net.Conn, error) {
	return dialFrom(c.plane.ns)(ctx, network, address)
}
