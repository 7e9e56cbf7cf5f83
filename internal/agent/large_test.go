//go:build !race

// The race detector makes this ten times slower.

package agent

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/policy"
)

// largeList is a file with the most prefixes of both families.
func largeList() string {
	var b strings.Builder
	b.WriteString("nonMasqueradeCIDRs:\n")
	for i := range policy.MaxPrefixes {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 11<<24+uint32(i)*512)
		fmt.Fprintf(&b, "- %s/24\n- 2001:db8:%x:%x::/64\n", netip.AddrFrom4(a), i>>16, i&0xffff)
	}
	return b.String()
}

// The longest list is in the kernel about a second after the file has changed; on
// a machine that has other things to do the limit is another one.
func TestAgentWithTheLongestList(t *testing.T) {
	n := newNode(t)
	write(t, n.list, goodList)
	_, stop := n.start(t)
	n.await(t, 20*time.Second, healthyStatus)
	long := largeList()
	for i, text := range []string{long, strings.Replace(long, "11.0.0.0/24", "9.0.0.0/24", 1)} {
		tmp := n.list + ".new"
		write(t, tmp, text)
		changed := time.Now()
		if err := os.Rename(tmp, n.list); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // a status of this length is work for the agent as well
		s := n.await(t, 20*time.Second, func(s Status) bool { return s.Agent.LastApply.After(changed) })
		took := s.Agent.LastApply.Sub(changed)
		t.Logf("list %d: in the kernel after %s", i, took)
		if s.IPMasqAgent.Prefixes != 2*policy.MaxPrefixes+2 || took > 4*time.Second {
			t.Errorf("list %d: %d prefixes after %s", i, s.IPMasqAgent.Prefixes, took)
		}
	}
	stop(unix.SIGTERM)
}

// BenchmarkLargeList is what the agent does with the longest list, but for the kernel.
func BenchmarkLargeList(b *testing.B) {
	path := filepath.Join(b.TempDir(), "list")
	if err := os.WriteFile(path, []byte(largeList()), 0o600); err != nil {
		b.Fatal(err)
	}
	cfg, err := config.Load(config.Sources{Flags: flags("pod-cidrs=10.1.0.0/16,fd00::/64", "enable-ip-masq-agent=true")})
	if err != nil {
		b.Fatal(err)
	}
	list, err := ipmasq.Load(path, ipmasq.Cilium)
	if err != nil {
		b.Fatal(err)
	}
	f := nodeFacts()
	f.nonMasq = list.Rules
	w, v := assemble(cfg, f), assemble(cfg, f)
	file, other := newPolicyFile(w), newPolicyFile(v)
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"load", func() error { _, err := ipmasq.Load(path, ipmasq.Cilium); return err }},
		{"assemble", func() error { assemble(cfg, f); return nil }},
		{"compare", func() error { same(w.input, v.input); return nil }},
		{"build", func() error { _, err := policy.Build(w.input); return err }},
		{"compare-file", func() error { file.same(other); return nil }},
		{"write-file", func() error { return file.write(filepath.Dir(path)) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if err := c.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLargeCluster is what the agent does for one changed node of 15,000, but for the kernel.
func BenchmarkLargeCluster(b *testing.B) {
	const size = 15000
	cfg, err := config.Load(config.Sources{Flags: flags("enable-k8s=true", "k8s-node-name=a")})
	if err != nil {
		b.Fatal(err)
	}
	f := nodeFacts()
	f.kube = kubeFacts{known: true, own: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}
	for i := range size {
		name := fmt.Sprintf("node-%05d.region.example.internal", i)
		a4 := netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0})
		a6 := netip.AddrFrom16([16]byte{0: 0xfd, 5: byte(i >> 8), 6: byte(i)})
		f.kube.pods = append(f.kube.pods, policy.Rule{Prefix: netip.PrefixFrom(a4, 24), Origin: "node " + name},
			policy.Rule{Prefix: netip.PrefixFrom(a6, 64), Origin: "node " + name})
		for _, a := range []netip.Addr{a4.Next(), a6.Next()} {
			f.kube.nodes = append(f.kube.nodes, policy.NodeAddr{Addr: a, Node: name, Type: policy.InternalIP, Origin: "node " + name})
		}
	}
	w, v := assemble(cfg, f), assemble(cfg, f)
	file, other := newPolicyFile(w), newPolicyFile(v)
	dir := b.TempDir()
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"assemble", func() error { assemble(cfg, f); return nil }},
		{"compare", func() error { same(w.input, v.input); return nil }},
		{"build", func() error { _, err := policy.Build(w.input); return err }},
		{"compare-file", func() error { file.same(other); return nil }},
		{"write-file", func() error { return file.write(dir) }},
		{"warn", func() error { tunnelWarning(cfg, f.kube.pods, f.network); return nil }},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if err := c.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
