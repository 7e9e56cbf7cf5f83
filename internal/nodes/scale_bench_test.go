package nodes

import (
	"bytes"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

// BenchmarkCluster is what 15,000 nodes take in memory and time when they are read, and what an
// informer with the types of the API would keep of them: as they are, or cut to what we need.
func BenchmarkCluster(b *testing.B) {
	const size = 15_000
	list := &corev1.NodeList{ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	for i := range size {
		list.Items = append(list.Items, *nodestest.Large(i))
	}
	data := encodeList(b, list)
	items := make([][]byte, size)
	for i := range items {
		var err error
		if items[i], err = list.Items[i].Marshal(); err != nil {
			b.Fatal(err)
		}
	}
	list = nil
	typed := func(cut func(*corev1.Node)) any {
		nodes := make(map[string]*corev1.Node)
		for _, item := range items {
			n := &corev1.Node{}
			if err := n.Unmarshal(item); err != nil {
				b.Fatal(err)
			}
			cut(n)
			nodes[n.Name] = n
		}
		return nodes
	}
	for _, c := range []struct {
		name string
		do   func() any
	}{
		{"ours", func() any {
			s := newState("node-00000.region.example.internal")
			nodes := make(map[string]*node)
			if _, err := readList(bytes.NewReader(data), func(n *node) { nodes[n.name] = n }); err != nil {
				b.Fatal(err)
			}
			s.replace(nodes)
			return []any{s, s.snapshot()}
		}},
		{"typed", func() any { return typed(func(*corev1.Node) {}) }},
		{"typed and cut", func() any {
			return typed(func(n *corev1.Node) {
				*n = corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, ResourceVersion: n.ResourceVersion},
					Spec: corev1.NodeSpec{PodCIDRs: n.Spec.PodCIDRs}, Status: corev1.NodeStatus{Addresses: n.Status.Addresses}}
			})
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				before := heap()
				kept := c.do()
				b.ReportMetric(float64(heap()-before)/1e6, "kept-MB")
				runtime.KeepAlive(kept)
			}
		})
	}
	runtime.KeepAlive(items)
	runtime.KeepAlive(data)
}

// heap is what is alive.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
