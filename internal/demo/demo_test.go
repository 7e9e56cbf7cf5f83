package demo_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
)

// build returns the path of a bauta binary made from this tree.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "bauta")
	out, err := exec.Command("go", "build", "-o", bin, "bauta.dev/bauta/cmd/bauta").CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// leftovers lists what a demo could leave on the host.
func leftovers(t *testing.T, tmp string) []string {
	t.Helper()
	var left []string
	files, err := filepath.Glob(filepath.Join(tmp, "bauta-demo-*"))
	if err != nil {
		t.Fatal(err)
	}
	left = append(left, files...)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(mounts), "\n") {
		if strings.Contains(line, tmp) {
			left = append(left, line)
		}
	}
	return left
}

func TestDemo(t *testing.T) {
	labtest.Root(t)
	tmp := t.TempDir()
	cmd := exec.Command(build(t), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "demo: PASS\n") {
		t.Fatalf("demo: %v\n%s", err, out)
	}
	for _, want := range []string{
		"Masquerading:   BPF (ip-masq-agent)   [eth0]   - [IPv4: Enabled, IPv6: Enabled]",
		"TCP  pod -> 192.0.2.2          seen as 192.0.2.1        masqueraded",
		"TCP  pod -> 198.51.100.10      seen as 10.0.1.2         not masqueraded (excluded)",
		"TCP  pod -> 198.51.100.10      seen as 192.0.2.1        masqueraded",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if left := leftovers(t, tmp); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// An interrupted demo leaves nothing either, whether it is asked to end or killed.
func TestInterrupt(t *testing.T) {
	labtest.Root(t)
	bin := build(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			tmp := t.TempDir()
			cmd := exec.Command(bin, "demo")
			cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			var out lockedBuffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			context.AfterFunc(ctx, func() { cmd.Process.Kill() })
			labtest.Eventually(t, 20*time.Second, func() error { return out.has("What the server saw") })
			cmd.Process.Signal(sig)
			cmd.Wait()
			labtest.Eventually(t, 10*time.Second, func() error {
				if left := leftovers(t, tmp); len(left) > 0 {
					return &leftError{left}
				}
				return nil
			})
		})
	}
}

// --keep says how to use and how to remove what it leaves, and that works.
func TestKeep(t *testing.T) {
	labtest.Root(t)
	tmp := t.TempDir()
	var out lockedBuffer
	cmd := exec.Command(build(t), "demo", "--keep")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("demo --keep: %v\n%s", err, out.buf.String())
	}
	text := out.buf.String()
	pod := regexp.MustCompile(`(?m)^  pod: +(nsenter .*)$`).FindStringSubmatch(text)
	kill := regexp.MustCompile(`(?m)^  kill (\d+)$`).FindStringSubmatch(text)
	if pod == nil || kill == nil {
		t.Fatalf("no instructions:\n%s", text)
	}
	defer exec.Command("kill", kill[1]).Run()
	args := append(strings.Fields(pod[1]), "-c", "1", "-W", "5")
	if got, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", pod[1], err, got)
	}
	if got, err := exec.Command("kill", kill[1]).CombinedOutput(); err != nil {
		t.Fatalf("kill: %v %s", err, got)
	}
	labtest.Eventually(t, 10*time.Second, func() error {
		if left := leftovers(t, tmp); len(left) > 0 {
			return &leftError{left}
		}
		return nil
	})
}

type leftError struct{ left []string }

func (e *leftError) Error() string { return "left behind: " + strings.Join(e.left, ", ") }

// lockedBuffer is written by the command's copying goroutine and read by the test.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) has(text string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !strings.Contains(b.buf.String(), text) {
		return fmt.Errorf("output lacks %q", text)
	}
	return nil
}
