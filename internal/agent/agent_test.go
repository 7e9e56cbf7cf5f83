package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// childEnv makes the test binary an agent: a process has one network namespace, a
// test has several. Its value is childOptions.
const childEnv = "BAUTA_TEST_AGENT"

type childOptions struct {
	Flags           map[string]string
	File            string
	BPFRoot, RunDir string
}

// child runs an agent if this process is to be one.
func child() {
	text := os.Getenv(childEnv)
	if text == "" {
		return
	}
	var c childOptions
	err := json.Unmarshal([]byte(text), &c)
	src := config.Sources{Flags: c.Flags, File: c.File}
	cfg, cfgErr := config.Load(src)
	if err = errors.Join(err, cfgErr); err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		defer stop()
		err = Run(ctx, Options{
			Config: cfg, ConfigSources: src, BPFRoot: c.BPFRoot, RunDir: c.RunDir, Version: "test",
			Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// node is a lab with a node to run agents on.
type node struct {
	*lab.Topology
	childOptions
	list string // the ip-masq-agent file
}

func newNode(t *testing.T) *node {
	t.Helper()
	topo := labtest.NewNode(t, lab.Options{})
	n := &node{Topology: topo, list: filepath.Join(t.TempDir(), "list")}
	n.childOptions = childOptions{
		Flags: flags("pod-cidrs=10.0.1.0/24,fd00:1::/64", "enable-ip-masq-agent=true", "ip-masq-agent-config-path="+n.list,
			"allow-private-bpffs=true"),
		BPFRoot: filepath.Join(labtest.BPFFS(t), "bauta"),
		RunDir:  newRunDir(t),
	}
	return n
}

// start runs an agent on the node until stop, which sends the signal.
func (n *node) start(t *testing.T) (cmd *exec.Cmd, stop func(unix.Signal)) {
	t.Helper()
	options, err := json.Marshal(n.childOptions)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(options))
	cmd.Stderr = &log
	if err := n.Node.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func(sig unix.Signal) {
		if ended {
			return
		}
		ended = true
		cmd.Process.Signal(sig)
		err := cmd.Wait()
		if sig == unix.SIGTERM && err != nil {
			t.Errorf("agent: %v", err)
		}
		if t.Failed() {
			t.Logf("agent:\n%s", log.String())
		}
	}
	t.Cleanup(func() { stop(unix.SIGKILL) })
	return cmd, stop
}

// status is read in the node's namespace, where its devices are.
func (n *node) status() (s Status, err error) {
	err = n.Node.Do(func() error {
		s, err = ReadStatus(n.BPFRoot, n.RunDir)
		return err
	})
	return s, err
}

// await waits until the status is as wanted, and returns it.
func (n *node) await(t *testing.T, timeout time.Duration, want func(Status) bool) (s Status) {
	t.Helper()
	labtest.Eventually(t, timeout, func() (err error) {
		if s, err = n.status(); err == nil && !want(s) {
			err = fmt.Errorf("status %s, %v, %+v", s.Line(), s.Degraded(), s.IPMasqAgent)
		}
		return err
	})
	return s
}

func healthyStatus(s Status) bool { return s.Agent.Ready && len(s.Degraded()) == 0 }

const lines = "   [eth0]   - [IPv4: Enabled, IPv6: Enabled]"

func TestAgentOnANode(t *testing.T) {
	n := newNode(t)
	write(t, n.list, goodList)
	cmd, stop := n.start(t)
	s := n.await(t, 20*time.Second, healthyStatus)
	if want := "BPF (ip-masq-agent)" + lines; s.Line() != want {
		t.Errorf("%s\nwant %s", s.Line(), want)
	}
	if s.Agent.PID != cmd.Process.Pid || s.Agent.State != Running || s.Datapath.Tier == "" {
		t.Errorf("%+v %+v", s.Agent, s.Datapath)
	}

	// The kernel follows the file within a second, and a bad file changes nothing.
	write(t, n.list, strings.ReplaceAll(goodList, "10.0.0.0/8", "10.0.0.0/8, 198.51.100.0/24"))
	n.await(t, time.Second, func(s Status) bool {
		return s.IPMasqAgent.Prefixes == 2 && n.excludes(t) == "10.0.0.0/8 198.51.100.0/24"
	})
	write(t, n.list, badList)
	n.await(t, time.Second, func(s Status) bool { return s.IPMasqAgent.LastError != "" && s.IPMasqAgent.Prefixes == 2 })
	if got := n.excludes(t); got != "10.0.0.0/8 198.51.100.0/24" {
		t.Errorf("after a bad file: %s", got)
	}

	// Killed, it leaves everything; the next one starts from it although the file is bad.
	stop(unix.SIGKILL)
	s, err := n.status()
	if want := "BPF (ip-masq-agent)" + lines; err != nil || s.Line() != want || s.Agent.State != Down || s.Degraded()[0] != "agent down" {
		t.Errorf("killed: %s %v %v", s.Line(), s.Degraded(), err)
	}
	_, stop = n.start(t)
	s = n.await(t, 20*time.Second, func(s Status) bool { return s.Agent.Ready })
	if s.IPMasqAgent.InForce != FromPinned || n.excludes(t) != "10.0.0.0/8 198.51.100.0/24" {
		t.Errorf("after a restart with a bad file: %+v", s.IPMasqAgent)
	}
	stop(unix.SIGTERM)
}

// excludes is the ip-masq-agent list in the kernel.
func (n *node) excludes(t *testing.T) string {
	t.Helper()
	k, err := inspectRoot(n.BPFRoot)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	list, err := k.Exclusions()
	if err != nil {
		t.Fatal(err)
	}
	texts := make([]string, len(list))
	for i, p := range list {
		texts[i] = p.String()
	}
	return strings.Join(texts, " ")
}

// What vanishes from the node has no mappings a second later.
func TestAgentEndsMappingsOfAVanishedAddress(t *testing.T) {
	n := newNode(t)
	write(t, n.list, goodList)
	_, stop := n.start(t)
	n.await(t, 20*time.Second, healthyStatus)
	// The discard port answers nothing but an ICMP error, which ends no mapping.
	err := n.Pods[0].Do(func() error {
		c, err := net.Dial("udp4", net.JoinHostPort(n.WorldAddr.V4.String(), "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	n.await(t, 5*time.Second, func(s Status) bool { return s.Flows.IPv4.Flows == 1 })
	out, err := n.Node.Run(t.Context(), labtest.Tool(t, "ip"), "addr", "replace", "192.0.2.66/24", "dev", "eth0")
	if err != nil {
		t.Fatal(err, out)
	}
	if out, err := n.Node.Run(t.Context(), "ip", "addr", "del", n.NodeAddr.V4.String()+"/24", "dev", "eth0"); err != nil {
		t.Fatal(err, out)
	}
	n.await(t, time.Second, func(s Status) bool { return s.Flows.IPv4.Flows == 0 })
	stop(unix.SIGTERM)
}

func TestSecondAgentIsRefused(t *testing.T) {
	n := newNode(t)
	_, stop := n.start(t)
	n.await(t, 20*time.Second, healthyStatus)
	second, _ := n.start(t)
	if err := second.Wait(); err == nil {
		t.Error("a second agent ran")
	}
	if s, err := n.status(); err != nil || !healthyStatus(s) {
		t.Errorf("the first one: %v %v", s.Degraded(), err)
	}
	stop(unix.SIGTERM)
}
