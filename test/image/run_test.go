package image_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

const patience = 10 * time.Second

// container is an image's files, mounted as the chart does it: all is read-only but what is named.
type container struct {
	t    *testing.T
	root string
	ns   *lab.NS
}

func newContainer(t *testing.T, ns *lab.NS, root string) *container {
	t.Helper()
	mount := func(source, at, kind, options string, flags uintptr) {
		t.Helper()
		target := filepath.Join(root, at)
		if err := unix.Mount(source, target, kind, flags, options); err != nil {
			t.Fatalf("mount %s: %v", target, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", target, err)
			}
		})
	}
	lock := filepath.Join(root, "run/xtables.lock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil { // a runtime makes what it mounts on
		t.Fatal(err)
	}
	ownLock := filepath.Join(t.TempDir(), "xtables.lock")
	if err := os.WriteFile(ownLock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mount(root, "", "", "", unix.MS_BIND)
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount %s read-only: %v", root, err)
	}
	for _, at := range []string{"proc", "dev", "sys"} {
		mount("/"+at, at, "", "", unix.MS_BIND)
	}
	mount("bpf", "sys/fs/bpf", "bpf", "", 0)
	mount("tmpfs", "run/bauta", "tmpfs", "mode=0755", 0)
	mount(ownLock, "run/xtables.lock", "", "", unix.MS_BIND)
	return &container{t, root, ns}
}

// command is one that the image's runtime would start: its folder, its environment.
func (c *container) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path.Join("/usr/sbin", args[0]), args[1:]...)
	if path.IsAbs(args[0]) {
		cmd.Path = args[0]
	}
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: c.root}
	return cmd
}

func (c *container) run(input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &out
	err := c.ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// mustRun fails the test if the command does.
func (c *container) mustRun(input string, args ...string) string {
	c.t.Helper()
	out, err := c.run(input, args...)
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// startAgent starts the entry point and waits until it has applied its policy.
func (c *container) startAgent(args ...string) agent.Status {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background()) // until the end of the test, and its clean-up
	log := &logBuffer{}
	cmd := c.command(ctx, append([]string{"/bauta", "agent"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stdout, cmd.Stderr = log, log
	if err := c.ns.Start(cmd); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if c.t.Failed() {
			c.t.Logf("agent's log:\n%s", log)
		}
	})
	var st agent.Status
	labtest.Eventually(c.t, 30*time.Second, func() error {
		out, err := c.run("", "/bauta", "status", "-o", "json")
		st = agent.Status{}
		if json.Unmarshal([]byte(out), &st) != nil {
			return fmt.Errorf("status: %w\n%s", err, out)
		}
		if !st.Agent.Ready {
			return fmt.Errorf("agent is not ready: %s %s", st.Agent.State, st.Agent.Error)
		}
		return nil
	})
	return st
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// masqueraded asks a server in the world who came, in both families.
func masqueraded(t *testing.T, n *lab.Topology) {
	t.Helper()
	for _, dst := range n.WorldAddr.All() {
		server, err := lab.EchoTCP(n.World, anyPort(dst))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, server.Close)
		ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience(patience))
		defer cancel()
		seen, conn, err := lab.AskTCP(ctx, n.Pods[0], anyPort(n.PodAddrs[0].Of(dst)), server.Addr)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if want := n.NodeAddr.Of(dst); seen.Addr() != want {
			t.Errorf("a pod came to %s from %s, want %s", dst, seen, want)
		}
	}
}

func anyPort(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 0) }

var podCIDRs = "--pod-cidrs=" + lab.PodRange4.String() + "," + lab.PodRange6.String()

func TestEBPFImageRuns(t *testing.T) {
	n := labtest.NewNode(t, lab.Options{})
	c := newContainer(t, n.Node, unpacked(t, "ebpf", "amd64"))
	if out := c.mustRun("", "/bauta", "version"); !strings.Contains(out, "image-test") || strings.Contains(out, "unknown") {
		t.Errorf("version and commit are missing:\n%s", out)
	}
	if st := c.startAgent(podCIDRs, "--allow-private-bpffs"); st.Masquerading.Mode != "BPF" {
		t.Errorf("%+v", st.Masquerading)
	}
	masqueraded(t, n)
}

// Each backend as its wrapper would choose it: by the rules that are there.
func TestIPTablesImageRuns(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			n := labtest.NewNode(t, lab.Options{})
			c := newContainer(t, n.Node, unpacked(t, "iptables", "amd64"))
			for _, family := range []string{"iptables", "ip6tables"} {
				c.mustRun("*filter\n-A INPUT -p sctp --dport 1 -m comment --comment other -j ACCEPT\nCOMMIT\n", family+"-"+backend+"-restore", "--noflush")
			}
			st := c.startAgent(podCIDRs, "--enable-bpf-masquerade=false")
			if st.Datapath.Tier != "iptables-"+backend {
				t.Errorf("the agent works with %s", st.Datapath.Tier)
			}
			masqueraded(t, n)
			if out := c.mustRun("", "iptables-"+backend+"-save"); !strings.Contains(out, "SNAT") {
				t.Errorf("no rules:\n%s", out)
			}
		})
	}
}

// Rules of others may use any extension; a listing without it says nothing about them.
func TestIPTablesImageHasAllExtensions(t *testing.T) {
	ns := labtest.NewNS(t)
	root := unpacked(t, "iptables", "amd64")
	c := newContainer(t, ns, root)
	found, err := filepath.Glob(filepath.Join(root, "usr/lib/x86_64-linux-gnu/xtables/libxt_*.so"))
	if err != nil || len(found) < 60 {
		t.Fatalf("%d extensions, %v", len(found), err)
	}
	for _, file := range found {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "libxt_"), ".so")
		kind := "-m"
		switch {
		case name == "standard":
			kind, name = "-j", "ACCEPT"
		case name == strings.ToUpper(name):
			kind = "-j"
		}
		for _, backend := range []string{"nft", "legacy"} {
			if out, err := c.run("", "iptables-"+backend, kind, name, "--help"); err != nil || strings.Contains(out, "Couldn't load") {
				t.Errorf("iptables-%s %s %s --help: %v\n%s", backend, kind, name, err, out)
			}
		}
	}
}
