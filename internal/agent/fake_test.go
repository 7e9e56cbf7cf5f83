package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

// TestMain fails when a goroutine outlives the tests.
func TestMain(m *testing.M) {
	child()
	before := runtime.NumGoroutine()
	code := m.Run()
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before && time.Now().Before(deadline) {
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); code == 0 && n > before {
		stacks := make([]byte, 1<<20)
		fmt.Fprintf(os.Stderr, "%d goroutines, %d at the start:\n%s\n", n, before, stacks[:runtime.Stack(stacks, true)])
		code = 1
	}
	os.Exit(code)
}

var quiet = slog.New(slog.DiscardHandler)

func load(t *testing.T, options ...string) config.Config {
	t.Helper()
	return loadFrom(t, config.Sources{Flags: flags(options...)})
}

func loadFrom(t *testing.T, src config.Sources) config.Config {
	t.Helper()
	cfg, err := config.Load(src)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func flags(options ...string) map[string]string {
	f := make(map[string]string)
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		f[name] = value
	}
	return f
}

// device adds a device with addresses, and the default routes of their families,
// to a snapshot.
func device(s devices.Snapshot, index int, name string, addrs ...string) devices.Snapshot {
	s.Links = append(slices.Clip(s.Links), devices.Link{Index: index, Name: name, Kind: "device", Hardware: "ether", Flags: unix.IFF_UP})
	for _, a := range addrs {
		p := netip.MustParsePrefix(a)
		s.Addrs = append(slices.Clip(s.Addrs), devices.Addr{Index: index, Addr: p.Addr(), Subnet: p.Masked()})
		all := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if p.Addr().Is4() {
			all = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		s.Routes = append(slices.Clip(s.Routes), devices.Route{Dst: all, Table: unix.RT_TABLE_MAIN, Hops: []devices.Hop{{Index: index}}})
	}
	return s
}

func rules(list []policy.Rule) string {
	texts := make([]string, len(list))
	for i, r := range list {
		texts[i] = fmt.Sprintf("%s (%s)", r.Prefix, r.Origin)
	}
	return strings.Join(texts, ", ")
}

// fakeKernel writes what it would do, a line each.
type fakeKernel struct {
	walkTook time.Duration // what each walk says; set before the loop runs
	lines    []string
	refuse   atomic.Pointer[error] // the answer to Apply
	started  time.Time

	mu       sync.Mutex
	attached []datapath.Attachment
	whole    int // how many Apply attached
}

func (k *fakeKernel) Warnings() []string { return nil }

func (k *fakeKernel) Healthy(context.Context) bool { return len(k.Attached()) == k.whole }

// change changes what is attached.
func (k *fakeKernel) change(f func([]datapath.Attachment) []datapath.Attachment) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.attached = f(k.attached)
}

func (k *fakeKernel) set(refuse error) { k.refuse.Store(&refuse) }

func (k *fakeKernel) say(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lines = append(k.lines, fmt.Sprintf("%5.2fs ", time.Since(k.started).Seconds())+fmt.Sprintf(format, args...))
}

func (k *fakeKernel) Apply(_ context.Context, p *policy.Policy) error {
	var devs, bad []string
	var attached []datapath.Attachment
	for _, d := range p.Input().Devices {
		devs = append(devs, fmt.Sprintf("%s %s", d.Name, d.IPv4))
		if strings.HasPrefix(d.Name, "bad") { // can't be attached
			bad = append(bad, d.Name)
			continue
		}
		attached = append(attached, datapath.Attachment{Device: d.Name, Index: d.Index, Hook: datapath.HookTCX})
	}
	var nonMasq []string
	for _, r := range p.Input().NonMasq {
		nonMasq = append(nonMasq, r.Prefix.String())
	}
	if len(nonMasq) > 3 {
		nonMasq = []string{fmt.Sprintf("%d prefixes", len(nonMasq))}
	}
	text := fmt.Sprintf("apply devices=%v nonmasq=%v nodes=%d", devs, nonMasq, len(p.Input().Nodes))
	if err := k.refuse.Load(); err != nil && *err != nil {
		k.say("%s: %v", text, *err)
		return *err
	}
	k.change(func([]datapath.Attachment) []datapath.Attachment { return attached })
	k.whole = len(attached)
	if len(bad) > 0 {
		err := fmt.Errorf("%w: %s", datapath.ErrAttach, strings.Join(bad, " "))
		k.say("%s: %v", text, err)
		return err
	}
	k.say("%s", text)
	return nil
}

func (k *fakeKernel) Walk(context.Context) (datapath.Swept, error) {
	k.say("sweep")
	return datapath.Swept{Took: k.walkTook, Protos: [2]map[uint8]int{{policy.ProtoTCP: 4}}, Worst: datapath.PortUse{Used: 1, Pool: 4}}, nil
}

func (k *fakeKernel) SetTunnels([]datapath.Tunnel) error { return nil }

func (k *fakeKernel) Drain(datapath.Swept) error { return nil }

func (k *fakeKernel) Attached() []datapath.Attachment {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.attached)
}
func (k *fakeKernel) Close() error { return nil }

// fakeInspector is what a kernel would tell.
type fakeInspector struct {
	applied        bool
	exclusions     []netip.Prefix
	attached       []datapath.Attachment
	counts         []datapath.Count
	usage          [2]datapath.Usage
	worst          datapath.PortUse
	err            error
	leaks, samples []datapath.Leak
}

func (k fakeInspector) Counts() ([]datapath.Count, error)           { return k.counts, k.err }
func (k fakeInspector) Exclusions() ([]netip.Prefix, error)         { return k.exclusions, k.err }
func (k fakeInspector) Attachments() ([]datapath.Attachment, error) { return k.attached, k.err }
func (k fakeInspector) Usage() ([2]datapath.Usage, error)           { return k.usage, k.err }
func (k fakeInspector) PortSearches() (datapath.PortSearches, error) {
	return datapath.PortSearches{Attempts: make([]uint64, 12)}, k.err
}
func (k fakeInspector) Leaks() (devices, samples []datapath.Leak, err error) {
	return k.leaks, k.samples, k.err
}
func (k fakeInspector) WorstPort() (datapath.PortUse, error) { return k.worst, k.err }
func (k fakeInspector) Limits() [2]datapath.Usage            { return k.usage }
func (k fakeInspector) Reclaimed() (uint64, error)           { return 5, k.err }
func (k fakeInspector) Pods(most int) ([]datapath.Pod, error) {
	return []datapath.Pod{{Addr: netip.MustParseAddr("10.1.0.9"), Flows: 3}}[:min(most, 1)], k.err
}
func (k fakeInspector) Applied() bool { return k.applied }
func (k fakeInspector) Tier() string  { return "tcx" }
func (k fakeInspector) Close() error  { return nil }
