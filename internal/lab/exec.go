package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Start starts the command inside the namespace. cmd.Start itself, and what
// calls it (Run, Output), would start it outside.
func (ns *NS) Start(cmd *exec.Cmd) error {
	return ns.Do(cmd.Start)
}

// Run runs a command inside the namespace and returns what it wrote to stdout
// and stderr, also with an error.
func (ns *NS) Run(ctx context.Context, name string, args ...string) (string, error) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	// A grandchild that survives a cancellation must not hold the pipe open; one that
	// ends a little later than its parent, as mtr's does, is no error.
	cmd.WaitDelay = 5 * time.Second
	err := ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("run %s in %s: %w", strings.Join(append([]string{name}, args...), " "), ns, err)
	}
	return out.String(), err
}

// Sysctl sets a kernel parameter inside the namespace. A key has dots, or
// slashes where a device name has dots (net/ipv4/conf/eth0.1/rp_filter).
// The kernel resolves /proc/sys/net by the namespace of the calling thread.
func (ns *NS) Sysctl(key, value string) error {
	err := ns.Do(func() error {
		// Not os.WriteFile: its O_CREATE turns a missing key into "permission denied".
		f, err := os.OpenFile(sysctlPath(key), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(value)
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", key, value, err)
	}
	return nil
}

// ReadSysctl reads a kernel parameter inside the namespace.
func (ns *NS) ReadSysctl(key string) (value string, err error) {
	err = ns.Do(func() error {
		b, err := os.ReadFile(sysctlPath(key))
		value = strings.TrimSpace(string(b))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("sysctl %s: %w", key, err)
	}
	return value, nil
}

func sysctlPath(key string) string {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return filepath.Join("/proc/sys", key)
}
