// Package demo proves the main job on one machine, without a cluster: a pod, a
// node and a server in network namespaces of their own, the real agent in the
// node, real traffic, and what the server saw.
//
// Nothing on the host changes: the namespaces are anonymous, and the bpffs is
// mounted in a private mount namespace, so all of it is gone with the process,
// however that ends.
package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
)

// Options of a run.
type Options struct {
	Out  io.Writer
	Keep bool // leave the namespaces and the agent running, and say how to use them
}

// inner marks the process that runs in the private mount namespace.
const inner = "BAUTA_DEMO_INNER"

// ErrFailed says that the proof failed; the output says where.
var ErrFailed = errors.New("demo failed")

// Run runs the demo in a child process with a mount namespace of its own.
func Run(ctx context.Context, opt Options) error {
	if os.Geteuid() != 0 {
		return errors.New("demo: must run as root (it makes network namespaces and loads BPF programs)")
	}
	if os.Getenv(inner) != "" {
		return runInner(ctx, opt)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("demo: find the executable: %w", err)
	}
	args := []string{"demo"}
	if opt.Keep {
		args = append(args, "--keep")
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), inner+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setpgid: true}
	if !opt.Keep {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("demo: start: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	kept, err := relay(opt.Out, out)
	if kept {
		return cmd.Process.Release()
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); errors.As(err, &exit) {
		return ErrFailed
	}
	return ctx.Err()
}

// keptMark ends the output of a child that stays.
const keptMark = "\x00kept"

// relay copies the child's output until it ends or says that it stays.
func relay(w io.Writer, r io.Reader) (kept bool, err error) {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		text, found := strings.CutSuffix(string(buf[:n]), keptMark)
		if _, werr := io.WriteString(w, text); werr != nil {
			return found, werr
		}
		if found || errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// demo is a run in progress.
type demo struct {
	opt     Options
	top     *lab.Topology
	dir     string
	self    string
	agent   *exec.Cmd
	log     bytes.Buffer
	servers []*lab.Server
}

func runInner(ctx context.Context, opt Options) (err error) {
	// A killed parent reads no more: the clean-up must not die of that.
	signal.Ignore(syscall.SIGPIPE)
	d := &demo{opt: opt}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.setUp(ctx); err != nil {
		return err
	}
	if err := d.prove(ctx); err != nil {
		d.printf("\ndemo: FAIL: %v\n", err)
		if d.log.Len() > 0 {
			d.printf("\nagent's log:\n%s", d.log.String())
		}
		return err
	}
	d.printf("\ndemo: PASS\n")
	if opt.Keep {
		d.keep(ctx)
	}
	return nil
}

func (d *demo) printf(format string, args ...any) { fmt.Fprintf(d.opt.Out, format, args...) }

// Where the demo keeps its files; the bpffs is a mount of the private namespace.
func (d *demo) bpfRoot() string  { return filepath.Join(d.dir, "bpf", "bauta") }
func (d *demo) runDir() string   { return filepath.Join(d.dir, "run") }
func (d *demo) masqFile() string { return filepath.Join(d.dir, "ip-masq-agent") }

func (d *demo) setUp(ctx context.Context) (err error) {
	if d.self, err = os.Executable(); err != nil {
		return fmt.Errorf("find the executable: %w", err)
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if d.dir, err = os.MkdirTemp("", "bauta-demo-"); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(d.dir, "bpf"), 0o700); err != nil {
		return err
	}
	if _, err := lab.MountBPFFS(filepath.Join(d.dir, "bpf")); err != nil {
		return err
	}
	d.top, err = lab.Node(lab.Options{WorldKnowsPods: true})
	if err != nil {
		return err
	}
	d.printf(`A pod, a node and a server, each in a network namespace of its own:

  pod %-16s ----  node, eth0 %-16s ----  server %s
      %-16s                  %-16s              %s

The server also has %s and %s, which the ip-masq-agent file excludes.

`, d.top.PodAddrs[0].V4, d.top.NodeAddr.V4, d.top.WorldAddr.V4,
		d.top.PodAddrs[0].V6, d.top.NodeAddr.V6, d.top.WorldAddr.V6, d.top.Excluded.V4, d.top.Excluded.V6)
	return nil
}

// writeList replaces the ip-masq-agent file as an editor or the kubelet does: by a rename.
func (d *demo) writeList(prefixes ...string) error {
	var b strings.Builder
	b.WriteString("nonMasqueradeCIDRs:\n")
	for _, p := range prefixes {
		fmt.Fprintf(&b, "- %s\n", p)
	}
	tmp := filepath.Join(d.dir, ".ip-masq-agent.new")
	if err := os.WriteFile(tmp, []byte(b.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, d.masqFile())
}

func (d *demo) startAgent() error {
	args := []string{"agent", "--bpf-root", d.bpfRoot(), "--run-dir", d.runDir(), "--allow-private-bpffs",
		"--pod-cidrs", lab.PodRange4.String() + "," + lab.PodRange6.String(),
		"--enable-ip-masq-agent", "--ip-masq-agent-config-path", d.masqFile()}
	d.printf("$ bauta %s\n", strings.Join(args[:1], " ")+" --pod-cidrs "+args[7]+" --enable-ip-masq-agent ...\n")
	d.agent = exec.Command(d.self, args...)
	d.agent.Stdout, d.agent.Stderr = &d.log, &d.log
	d.agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return d.top.Node.Start(d.agent)
}

// bauta runs a command of the CLI in the node and returns its output.
func (d *demo) bauta(ctx context.Context, args ...string) (string, error) {
	all := append(slices.Clone(args), "--bpf-root", d.bpfRoot(), "--run-dir", d.runDir())
	out, err := d.top.Node.Run(ctx, d.self, all...)
	if err != nil {
		return out, fmt.Errorf("bauta %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out))
	}
	return out, nil
}

// show runs a command and prints it with its output.
func (d *demo) show(ctx context.Context, lines int, args ...string) (string, error) {
	out, err := d.bauta(ctx, args...)
	if err != nil {
		return out, err
	}
	d.printf("$ bauta %s\n", strings.Join(args, " "))
	for i, line := range strings.Split(strings.TrimRight(out, "\n"), "\n") {
		if lines > 0 && i >= lines {
			d.printf("  ...\n")
			break
		}
		d.printf("  %s\n", line)
	}
	d.printf("\n")
	return out, nil
}

func (d *demo) close() error {
	var errs []error
	if d.agent != nil && d.agent.Process != nil {
		d.agent.Process.Kill()
		d.agent.Wait()
	}
	for _, s := range d.servers {
		s.Close()
	}
	if d.top != nil {
		errs = append(errs, d.top.Close())
	}
	if d.dir != "" {
		// The mount goes with the namespace; the directory below it can't be removed before.
		syscall.Unmount(filepath.Join(d.dir, "bpf"), syscall.MNT_DETACH)
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}

// keep says how to use what is there, lets the parent go and waits for a signal.
func (d *demo) keep(ctx context.Context) {
	pid := os.Getpid()
	enter := func(ns *lab.NS) string {
		var path string
		ns.WithFD(func(fd int) error {
			path = fmt.Sprintf("nsenter -t %d -m --net=/proc/%d/fd/%d", pid, pid, fd)
			return nil
		})
		return path
	}
	d.printf(`
The namespaces, the agent and the servers stay. Use them:
  pod:     %s ping %s
  node:    %s %s status --bpf-root %s --run-dir %s
  server:  %s tcpdump -ni eth0
  list:    %s
Remove everything:
  kill %d
`, enter(d.top.Pods[0]), d.top.WorldAddr.V4, enter(d.top.Node), d.self, d.bpfRoot(), d.runDir(),
		enter(d.top.World), d.masqFile(), pid)
	// The parent's stderr must not stay open: somebody may read it to its end.
	if null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0); err == nil {
		unix.Dup2(int(null.Fd()), 2)
		null.Close()
	}
	fmt.Fprint(d.opt.Out, keptMark)
	d.opt.Out = io.Discard
	<-ctx.Done()
}

// eventually polls until f is content or the time is over.
func eventually(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %w", limit, err)
		case <-tick.C:
		}
	}
}

func port(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 8080) }
