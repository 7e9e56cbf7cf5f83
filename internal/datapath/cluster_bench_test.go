package datapath

import (
	"context"
	"encoding/binary"
	"net/netip"
	"strconv"
	"testing"

	"bauta.dev/bauta/internal/policy"
)

// cluster is what n other nodes add to a policy: a pod range and an address of each family.
func cluster(n int) (pods []policy.Rule, addrs []policy.NodeAddr) {
	for i := range n {
		var a4 [4]byte
		binary.BigEndian.PutUint32(a4[:], 20<<24+uint32(i)<<8)
		a6 := [16]byte{0: 0xfd, 5: byte(i >> 8), 6: byte(i)}
		b4, b6 := a4, a6
		b4[0], b6[1] = 40, 1
		pods = append(pods, policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4(a4), 24), Origin: "node n"},
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom16(a6), 64), Origin: "node n"})
		for _, a := range []netip.Addr{netip.AddrFrom4(b4), netip.AddrFrom16(b6)} {
			addrs = append(addrs, policy.NodeAddr{Addr: a, Node: "n", Type: policy.InternalIP, Origin: "node n"})
		}
	}
	return pods, addrs
}

// BenchmarkCluster is what one changed node costs in a cluster of that many.
func BenchmarkCluster(b *testing.B) {
	for _, nodes := range []int{100, 1000, 15000} {
		r := newRig(b)
		in := loopPolicy(ports(40000, 1000))
		in.Pods, in.Nodes = cluster(nodes)
		all, rest := in, in
		rest.Pods, rest.Nodes = in.Pods[2:], in.Nodes[2:]
		policies := make([]*policy.Policy, 2)
		for i, in := range []policy.Input{all, rest} {
			p, err := policy.Build(in)
			r.must(err)
			policies[i] = p
		}
		b.Run("build/"+strconv.Itoa(nodes), func(b *testing.B) {
			for b.Loop() {
				policy.Build(all)
			}
		})
		i := 0
		b.Run("apply/"+strconv.Itoa(nodes), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				i++
				next, err := r.d.writePolicy(context.Background(), policies[i%2])
				r.must(err)
				if r.d.applied != nil {
					r.d.releaseTries(r.d.applied, next)
				}
				r.d.applied = next
			}
		})
	}
}
