package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/nodes"
	"bauta.dev/bauta/internal/policy"
)

// fakeCluster is what a test says the API server said.
type fakeCluster struct {
	mu   sync.Mutex
	snap nodes.Snapshot
}

func (f *fakeCluster) Snapshot() nodes.Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snap
}

// kubeBench is a loop of a cluster's node a, which has no range but that of its Node object.
type kubeBench struct {
	*bench
	cluster *fakeCluster
}

func newKubeBench(t *testing.T, options ...string) *kubeBench {
	t.Helper()
	b := &kubeBench{newBench(t, append(options, "enable-k8s=true", "k8s-node-name=a")...), &fakeCluster{}}
	b.cfg.PodCIDRs = nil
	b.kube = b.cluster
	return b
}

// tell changes what the cluster says.
func (b *kubeBench) tell(change func(*nodes.Snapshot)) {
	b.cluster.mu.Lock()
	change(&b.cluster.snap)
	b.cluster.mu.Unlock()
	b.signals.kube.put()
}

func (b *kubeBench) view() Status {
	s, _ := b.published.Load().status(time.Now(), fakeInspector{applied: true, attached: b.kernel.Attached()})
	s.Kubernetes = kubeStatus(b.cfg, b.kube)
	return s
}

func pod(i int) policy.Rule {
	return policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(i), 0}), 24), Origin: fmt.Sprintf("node n%d", i)}
}

func nodeAddr(i int) policy.NodeAddr {
	return policy.NodeAddr{Addr: netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), Node: fmt.Sprintf("n%d", i), Type: policy.InternalIP, Origin: fmt.Sprintf("node n%d", i)}
}

// members are other nodes, and this one's range.
func members(n int) func(*nodes.Snapshot) {
	return func(s *nodes.Snapshot) {
		*s = nodes.Snapshot{Synced: true, Known: n + 1, Own: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}
		for i := range n {
			s.Pods, s.Nodes = append(s.Pods, pod(i)), append(s.Nodes, nodeAddr(i))
		}
	}
}

// applies are the lines of a kernel about policies.
func applies(lines string) []string {
	return slices.DeleteFunc(strings.Split(lines, "\n"), func(l string) bool { return !strings.Contains(l, " apply ") })
}

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

func degraded(s Status) string { return strings.Join(s.Degraded(), "; ") }

func TestLoopWaitsForTheCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t)
		var log bytes.Buffer
		b.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
		got := b.run(t, func() {
			after(time.Second)
			if s := b.view(); !strings.HasPrefix(degraded(s), "the nodes of the cluster are not known yet;") || s.Agent.Ready {
				t.Errorf("%s; %+v", degraded(s), s.Agent)
			}
			b.tell(func(s *nodes.Snapshot) { s.Error = "connection refused" })
			after(time.Minute)
			if s := b.view(); !strings.HasPrefix(degraded(s), "the nodes of the cluster are not known yet; API server: connection refused;") {
				t.Errorf("%s", degraded(s))
			}
			b.tell(func(s *nodes.Snapshot) {
				members(2)(s)
				s.Own, s.Problem = nil, "node a: its Node object has no podCIDRs"
			})
			after(time.Second)
			if s := b.view(); !strings.HasPrefix(degraded(s), "no source range yet: the Node object of this node has no podCIDRs; node a: its Node object has no podCIDRs;") || s.Agent.Ready {
				t.Errorf("%s; %+v", degraded(s), s.Agent)
			}
			b.tell(members(2))
			after(time.Second)
			s := b.view()
			if degraded(s) != "" || !s.Agent.Ready || rules(s.Sources.IPv4.Ranges) != "10.1.0.0/16 (node a)" || s.Nodes.Known != 2 {
				t.Errorf("%s; %+v", degraded(s), s)
			}
		})
		check(t, strings.Join(applies(got), "\n"), "62.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=2")
		waits := slices.DeleteFunc(strings.Split(log.String(), "\n"), func(l string) bool { return !strings.Contains(l, "waiting") })
		check(t, strings.Join(waits, "\n"), `
			level=INFO msg="no policy yet, waiting" for="the nodes of the cluster are not known yet"
			level=WARN msg="no policy yet, waiting" for="the nodes of the cluster are not known yet" error="connection refused"
			level=WARN msg="no policy yet, waiting" for="no source range yet: the Node object of this node has no podCIDRs" error="node a: its Node object has no podCIDRs"`)
	})
}

// pod-cidrs are enough for sources, but not for what is to be passed.
func TestLoopWaitsForOtherNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t)
		b.cfg.PodCIDRs = []policy.Rule{{Prefix: netip.MustParsePrefix("10.7.0.0/16"), Origin: "option pod-cidrs"}}
		got := b.run(t, func() {
			after(time.Second)
			b.tell(func(s *nodes.Snapshot) { members(1)(s); s.Own, s.Unranged, s.Problem = nil, true, "no podCIDRs" })
			after(time.Second)
			if s := b.view(); degraded(s) != "" {
				t.Errorf("with pod-cidrs of a network plugin: %s", degraded(s))
			}
			b.tell(members(1))
			after(time.Second)
			if s := b.view(); rules(s.Sources.IPv4.Ranges) != "10.1.0.0/16 (node a), 10.7.0.0/16 (option pod-cidrs)" {
				t.Error(rules(s.Sources.IPv4.Ranges))
			}
		})
		check(t, got, `
			 1.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=1
			 2.00s apply devices=[eth0 192.0.2.1] nonmasq=[] nodes=1`)
	})
}

// The state of the last run is in force until the first list, and what its Node object has
// lost until it has ranges again.
func TestLoopRestoresTheCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t)
		b.earlier = earlier{applied: true, file: &PolicyFile{Node: "a",
			Sources: []policy.Rule{{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Origin: "node a"}, {Prefix: netip.MustParsePrefix("10.9.0.0/16"), Origin: "option pod-cidrs"}},
			Pods:    []policy.Rule{pod(1), pod(2)},
			Nodes:   []policy.NodeAddr{nodeAddr(1), nodeAddr(2), {Addr: netip.MustParseAddr("198.51.100.77"), Origin: "file f"}},
		}}
		look := func(what, want string) {
			t.Helper()
			f, err := ReadPolicyFile(b.runDir)
			got := fmt.Sprintf("sources %s; pods %s; %d nodes; ready %v; degraded %s", rules(f.Sources), rules(f.Pods), len(f.Nodes), b.view().Agent.Ready, degraded(b.view()))
			if err != nil || got != want {
				t.Errorf("%s: %v\n%s\nwant\n%s", what, err, got, want)
			}
		}
		b.run(t, func() {
			const restored = "sources 10.1.0.0/16 (node a); pods 10.2.1.0/24 (node n1), 10.2.2.0/24 (node n2); 2 nodes; ready true; degraded "
			look("at the start", restored)
			b.tell(func(s *nodes.Snapshot) { s.Error = "connection refused" })
			after(time.Hour)
			look("an hour later", restored)
			if w := strings.Join(b.view().Warnings, "\n"); !strings.Contains(w, "API server: connection refused: what was known of the nodes stays in force") {
				t.Error(w)
			}
			b.tell(func(s *nodes.Snapshot) { members(1)(s); s.Own, s.Problem = nil, "no podCIDRs" })
			after(time.Second)
			look("without a range", "sources 10.1.0.0/16 (node a); pods 10.2.0.0/24 (node n0); 1 nodes; ready true; degraded no podCIDRs")
			b.tell(func(s *nodes.Snapshot) { members(1)(s); s.Own = []netip.Prefix{netip.MustParsePrefix("10.8.0.0/16")} })
			after(time.Second)
			look("with another range", "sources 10.8.0.0/16 (node a); pods 10.2.0.0/24 (node n0); 1 nodes; ready true; degraded ")
		})
	})
}

// Only an agent of this node that had to do with each family left something of the cluster.
func TestWhatIsRestored(t *testing.T) {
	const own, given = "10.1.0.0/16 (node a)", "10.9.0.0/16 (option pod-cidrs)"
	for _, c := range []struct {
		name    string
		file    PolicyFile
		sources []string
		want    string
	}{
		{"this node", PolicyFile{Node: "a"}, []string{own}, own},
		{"this node, without a range of its own", PolicyFile{Node: "a"}, []string{given}, given},
		{"without Kubernetes", PolicyFile{}, []string{given}, "waits"},
		{"another node", PolicyFile{Node: "b"}, []string{"10.2.1.0/24 (node b)"}, "waits"},
		{"IPv4 was off", PolicyFile{Node: "a", State4: SourcesOff}, nil, "waits"},
		{"IPv6 was off", PolicyFile{Node: "a", State6: SourcesOff}, []string{own}, "waits"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newKubeBench(t)
				for _, text := range c.sources {
					prefix, origin, _ := strings.Cut(strings.TrimSuffix(text, ")"), " (")
					r := policy.Rule{Prefix: netip.MustParsePrefix(prefix), Origin: origin}
					c.file.Sources = append(c.file.Sources, r)
					if strings.HasPrefix(origin, "option") {
						b.cfg.PodCIDRs = []policy.Rule{r}
					}
				}
				c.file.Pods = []policy.Rule{pod(1)}
				b.earlier = earlier{applied: true, file: &c.file}
				b.run(t, func() {
					after(time.Second)
					s := b.view()
					got := rules(s.Sources.IPv4.Ranges)
					if s.Agent.Waiting != "" {
						got = "waits"
					}
					if got != c.want {
						t.Errorf("%s, want %s", got, c.want)
					}
				})
			})
		})
	}
}

// Much news is few applies, and what is of no use is none.
func TestLoopGathersClusterNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t)
		got := b.run(t, func() {
			b.tell(members(1))
			after(time.Second)
			for i := range 100 { // in a second
				b.tell(members(2 + i))
				after(10 * time.Millisecond)
			}
			after(time.Second)
			b.tell(func(*nodes.Snapshot) {})
			after(time.Second)
			b.tell(members(3)) // one alone does not wait
			after(time.Second)
		})
		list := applies(got)
		if first, last := list[0], list[len(list)-1]; !strings.HasPrefix(first, " 0.00s") || len(list) != 6 ||
			!strings.HasPrefix(last, " 4.00s") || !strings.HasSuffix(list[4], "nodes=101") {
			t.Error(got)
		}
	})
}

func TestKubePause(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{
		time.Millisecond: 400 * time.Millisecond, 100 * time.Millisecond: 400 * time.Millisecond, time.Second: 4 * time.Second,
	} {
		if got := kubePause(took); got != want {
			t.Errorf("after %s: %s, want %s", took, got, want)
		}
	}
}

// Whatever Node objects say: an address that this node has is not another's.
func TestOwnAddressesAreNotRemote(t *testing.T) {
	f := nodeFacts()
	f.kube = kubeFacts{known: true, own: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, nodes: []policy.NodeAddr{
		{Addr: netip.MustParseAddr("192.0.2.1"), Node: "former", Origin: "node former"},
		{Addr: netip.MustParseAddr("192.0.2.9"), Node: "b", Origin: "node b"},
	}}
	w := assemble(load(t, "enable-k8s=true", "k8s-node-name=a"), f)
	if len(w.input.Nodes) != 1 || w.input.Nodes[0].Node != "b" {
		t.Errorf("%+v", w.input.Nodes)
	}
	if got, want := rules(w.input.Sources)+"; "+rules(w.input.Native), "10.1.0.0/16 (node a); 10.1.0.0/16 (node a)"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestTunnelWarning(t *testing.T) {
	s := device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24")
	s.Links = append(s.Links, devices.Link{Index: 9, Name: "flannel.1", Kind: "vxlan", Port: 8472, Flags: 1})
	route := func(dst string, index int) devices.Snapshot {
		t := s
		t.Routes = append([]devices.Route{{Dst: netip.MustParsePrefix(dst), Table: 254, Hops: []devices.Hop{{Index: index}}}}, s.Routes...)
		return t
	}
	pods := []policy.Rule{pod(0), pod(1)}
	for _, c := range []struct {
		options string
		s       devices.Snapshot
		want    string
	}{
		{"", s, ""},
		{"", route("10.2.1.0/24", 2), ""},
		{"", route("10.2.1.0/24", 9), "the tunnel flannel.1 (10.2.1.0/24)"},
		{"", route("10.0.0.0/8", 9), "the tunnel flannel.1 (10.2.0.0/24)"},
		{"", route("10.2.1.128/26", 9), "the tunnel flannel.1 (10.2.1.128/26)"},
		{"", route("10.3.0.0/24", 9), ""},
		{"remote-node-masquerade=none", route("10.2.1.0/24", 9), ""},
		{"remote-node-masquerade=all", route("10.2.1.0/24", 9), ""},
	} {
		got := tunnelWarning(load(t, strings.Fields(c.options+" pod-cidrs=10.1.0.0/16")...), pods, c.s)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) || got != "" && !strings.Contains(got, "all") {
			t.Errorf("%s %v: %q, want %q", c.options, c.s.Routes[0], got, c.want)
		}
	}
}

// Who deletes policy.json does not take from the next agent what is known of the cluster.
func TestLoopWritesALostPolicyFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t)
		b.run(t, func() {
			b.tell(members(1))
			after(time.Second)
			if err := os.Remove(filepath.Join(b.runDir, policyFileName)); err != nil {
				t.Fatal(err)
			}
			after(time.Minute)
			if f, err := ReadPolicyFile(b.runDir); err != nil || f.Node != "a" || len(f.Pods) != 1 {
				t.Errorf("%+v, %v", f, err)
			}
		})
	})
}
