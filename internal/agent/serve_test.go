package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

// runDir is a run directory with a path short enough for a socket.
func newRunDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bauta")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "run")
}

// answer serves a status until the test ends.
func answer(t *testing.T, runDir string, status func() (Status, error)) (stop func()) {
	t.Helper()
	l, err := listen(runDir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, l, runDir, status, quiet) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		done <- nil
	}
	t.Cleanup(stop)
	return stop
}

func noKernel() (inspector, error) { return nil, fmt.Errorf("/sys: %w", datapath.ErrNone) }

func emptyKernel(context.Context) (inspector, error) { return noKernel() }

func TestSocket(t *testing.T) {
	dir := newRunDir(t)
	if err := prepareRunDir(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, socketName)
	s := healthy()
	var failure error
	stop := answer(t, dir, func() (Status, error) { return s, failure })
	for p, mode := range map[string]fs.FileMode{dir: fs.ModeDir | 0o700, path: fs.ModeSocket | 0o600} {
		if info, err := os.Stat(p); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v %v, want %v", p, info.Mode(), err, mode)
		}
	}
	got, err := readStatus(dir, answerTimeout, emptyKernel)
	if err != nil || got.Line() != s.Line() || got.Agent.State != Running {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := listen(dir); err == nil || !strings.Contains(err.Error(), "another agent is running") {
		t.Errorf("second agent: %v", err)
	}
	failure = errors.New("tables not readable")
	if _, err := ask(dir, answerTimeout); err == nil || !strings.Contains(err.Error(), "tables not readable") {
		t.Errorf("ask: %v", err)
	}
	stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket after the end: %v", err)
	}
	if _, err := readStatus(dir, answerTimeout, emptyKernel); !errors.Is(err, ErrNothing) {
		t.Errorf("after the end: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := newRunDir(t)
	if err := prepareRunDir(dir); err != nil {
		t.Fatal(err)
	}
	l, err := listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // as a crash does: the file stays
	if _, err := readStatus(dir, answerTimeout, emptyKernel); !errors.Is(err, ErrNothing) {
		t.Errorf("with a stale socket: %v", err)
	}
	answer(t, dir, func() (Status, error) { return healthy(), nil })
	if _, err := ask(dir, answerTimeout); err != nil {
		t.Error(err)
	}
}

// An agent that can't answer is there nevertheless.
func TestAgentThatFailsIsThere(t *testing.T) {
	dir := newRunDir(t)
	if err := prepareRunDir(dir); err != nil {
		t.Fatal(err)
	}
	answer(t, dir, func() (Status, error) { return Status{}, errors.New("no answer of iptables") })
	if _, err := readStatus(dir, answerTimeout, emptyKernel); err == nil || errors.Is(err, ErrNothing) || !strings.Contains(err.Error(), "no answer of iptables") {
		t.Errorf("got %v", err)
	}
}

// One that hangs takes all the time that it is given, and none of what the kernel has.
func TestAgentThatHangs(t *testing.T) {
	dir := newRunDir(t)
	if err := prepareRunDir(dir); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := readStatus(dir, 50*time.Millisecond, func(ctx context.Context) (inspector, error) { return kernelOf(), ctx.Err() })
	if err != nil || !slices.Contains(s.Degraded(), "agent down") || !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.HasSuffix(w, "agent.sock, but does not answer within 50ms") }) {
		t.Errorf("%v; %q", err, s.Warnings)
	}
}

func TestSocketDoesNotReplaceAFile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, socketName), "x")
	if _, err := listen(dir); err == nil {
		t.Error("a file was replaced")
	}
}

func TestRunDirMustBeOurs(t *testing.T) {
	dir := t.TempDir()
	for mode, ok := range map[fs.FileMode]bool{0o700: true, 0o755: true, 0o775: false, 0o777: false} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := prepareRunDir(dir); (err == nil) != ok {
			t.Errorf("%v: %v", mode, err)
		}
		if info, _ := os.Stat(dir); info.Mode().Perm() != mode {
			t.Errorf("%v became %v", mode, info.Mode().Perm())
		}
	}
}

// kernelOf is a kernel with eth0 attached, eth7 draining and some counters.
func kernelOf() fakeInspector {
	return fakeInspector{
		applied:    true,
		exclusions: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		attached: []datapath.Attachment{
			{Device: "eth0", Index: 2, Hook: datapath.HookTCX, Ahead: []string{"other"}},
			{Device: "eth7", Index: 9, Hook: datapath.HookTC, Draining: true},
		},
		counts: []datapath.Count{
			{Outcome: policy.DropNoPort, Packets: 3}, {Outcome: policy.DropNoPort, IPv6: true, Packets: 4},
			{Outcome: policy.MasqKnown, Packets: 9}, {Outcome: policy.MasqHost, Packets: 2},
		},
		usage: [2]datapath.Usage{{Flows: 5, Limit: 10}, {Limit: 10}},
		worst: datapath.PortUse{Proto: 6, Remote: netip.MustParseAddrPort("192.0.2.8:443"), Used: 4, Pool: 8},
	}
}

// A leak is an alarm for some minutes, and afterwards still a warning.
func TestLeakStatus(t *testing.T) {
	k := kernelOf()
	k.attached[0].Sentinel = true
	k.samples = []datapath.Leak{{Index: 2, Source: netip.MustParseAddr("10.1.0.2"), Destination: netip.MustParseAddr("192.0.2.8"), Proto: 17, Packets: 3, Last: time.Second}}
	for _, c := range []struct {
		last     time.Duration
		degraded bool
	}{{3 * time.Second, true}, {leakAlarm * time.Second, true}, {(leakAlarm + 1) * time.Second, false}} {
		k.leaks = []datapath.Leak{{Index: 2, Packets: 5, First: time.Hour, Last: c.last}, {Index: 77, Packets: 1, Last: time.Hour}}
		s, err := readStatus(t.TempDir(), answerTimeout, func(context.Context) (inspector, error) { return k, nil })
		if err != nil {
			t.Fatal(err)
		}
		if l := s.Leaks; !l.Sentinel || l.Packets != 6 || len(l.Devices) != 2 || l.Devices[0].Device != "eth0" || l.Devices[1].Device != "77 (gone)" || len(l.Samples) != 1 {
			t.Errorf("%+v", l)
		}
		if alarm := slices.ContainsFunc(s.Degraded(), func(r string) bool { return strings.HasPrefix(r, "leak on eth0: 5 packets") }); alarm != c.degraded {
			t.Errorf("last leak %v ago: degraded %v", c.last, s.Degraded())
		}
		if !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "10.1.0.2 -> 192.0.2.8") }) {
			t.Errorf("warnings: %v", s.Warnings)
		}
	}
	k.attached = k.attached[1:] // draining, not watched
	if s, err := readStatus(t.TempDir(), answerTimeout, func(context.Context) (inspector, error) { return k, nil }); err != nil || !s.Leaks.Sentinel {
		t.Errorf("%+v, %v", s.Leaks, err)
	}
}

func TestOfflineStatus(t *testing.T) {
	dir := t.TempDir()
	f := facts{ports: externalPorts(32768, 65535), network: device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24"), nonMasq: []policy.Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Origin: "file f"}}}
	file := newPolicyFile(assemble(load(t, "pod-cidrs=10.1.0.0/16", "enable-ip-masq-agent=true", "ipv4-native-routing-cidr=10.0.0.0/8"), f))
	file.IPMasqAgent = IPMasqStatus{Enabled: true}
	if err := file.write(dir); err != nil {
		t.Fatal(err)
	}
	s, err := readStatus(dir, answerTimeout, func(context.Context) (inspector, error) { return kernelOf(), nil })
	if err != nil {
		t.Fatal(err)
	}
	if want := "BPF (ip-masq-agent)   [eth0]   10.0.0.0/8 [IPv4: Enabled, IPv6: Enabled]"; s.Line() != want {
		t.Errorf("%s\nwant %s", s.Line(), want)
	}
	if got := s.Degraded(); !slices.Equal(got, []string{"agent down"}) {
		t.Errorf("degraded: %v", got)
	}
	if s.Agent.State != Down || s.Drops["drop-no-port"] != 7 || len(s.Drops) != 1 || s.Flows.IPv4.Flows != 5 || s.Ports.Worst.Used != 4 || s.Ports.Pool != 32768 {
		t.Errorf("%+v", s)
	}
	if s.IPMasqAgent.Prefixes != 1 || s.IPMasqAgent.Rules[0].Origin != "file f" || s.Sources.IPv6.State != SourcesUnused {
		t.Errorf("%+v %+v", s.IPMasqAgent, s.Sources)
	}
	var states []string
	for _, d := range s.Devices {
		states = append(states, d.Name+" "+string(d.State)+" "+string(d.Hook))
	}
	if want := []string{"eth0 attached tcx", "eth7 draining tc"}; !slices.Equal(states, want) {
		t.Errorf("%v, want %v", states, want)
	}
	if text := strings.Join(s.Warnings, "\n"); len(s.Warnings) != 2 || !strings.Contains(text, "other") || !strings.Contains(text, "masq-host: 2 packets") {
		t.Errorf("warnings: %s", text)
	}
}

func TestOfflineStatusWithoutPolicyFile(t *testing.T) {
	s, err := readStatus(t.TempDir(), answerTimeout, func(context.Context) (inspector, error) { return kernelOf(), nil })
	if err != nil || s.IPMasqAgent.Prefixes != 1 || !s.Masquerading.IPMasqAgent || len(s.Warnings) == 0 || !slices.Contains(s.Degraded(), "agent down") {
		t.Errorf("%+v %v", s, err)
	}
	broken := kernelOf()
	broken.err = errors.New("not permitted")
	if _, err := readStatus(t.TempDir(), answerTimeout, func(context.Context) (inspector, error) { return broken, nil }); err == nil {
		t.Error("no error from a kernel that can't be read")
	}
}

func TestStatusJSONKeys(t *testing.T) {
	v := view{file: newPolicyFile(assemble(load(t, "pod-cidrs=10.1.0.0/16"), nodeFacts())), agent: AgentStatus{State: Running}}
	s, err := v.status(v.agent.Started, kernelOf())
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]json.RawMessage
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"masquerading", "agent", "devices", "sources", "ipMasqAgent", "nodes", "flows", "ports", "drops", "warnings"} {
		if v, ok := got[key]; !ok || string(v) == "null" {
			t.Errorf("%s: %s", key, v)
		}
	}
	want := `{"enabled":true,"enabledProtocols":{"ipv4":true,"ipv6":true},"mode":"BPF","ip-masq-agent":false,` +
		`"snat-exclusion-cidr-v4":"10.1.0.0/16","snat-exclusion-cidr-v6":""}`
	if string(got["masquerading"]) != want {
		t.Errorf("%s\nwant %s", got["masquerading"], want)
	}
}
