package nodes

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

// busyNode has something in every part of a Node.
func busyNode(random *rand.Rand, i int) *corev1.Node {
	n := nodestest.Node(fmt.Sprintf("node-%d", i), fmt.Sprintf("10.%d.%d.0/24,fd00:%x::/64", i>>8&255, i&255, i),
		fmt.Sprintf("InternalIP=172.16.%d.%d", i>>8&255, i&255), fmt.Sprintf("InternalIP=2001:db8::%x", i), fmt.Sprintf("Hostname=node-%d", i))
	n.ResourceVersion = fmt.Sprint(1000 + i)
	n.CreationTimestamp = metav1.NewTime(time.Unix(1700000000, 0))
	n.Labels, n.Annotations = map[string]string{"a": "b"}, map[string]string{"c": "d", metav1.InitialEventsAnnotationKey: "false"}
	n.OwnerReferences = []metav1.OwnerReference{{Kind: "x", Name: "y"}}
	n.Spec.Taints = []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectNoSchedule}}
	n.Spec.Unschedulable, n.Spec.ProviderID = true, "p://1"
	n.Status.Capacity = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4")}
	n.Status.DaemonEndpoints.KubeletEndpoint.Port = 10250
	for range random.IntN(50) {
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{Names: []string{strings.Repeat("n", random.IntN(300))}, SizeBytes: random.Int64()})
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, LastHeartbeatTime: metav1.Now()}}
	n.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1("{}")}}
	return n
}

func describe(n *node) string {
	return fmt.Sprint(n.name, n.version, n.initialEnd, n.podCIDRs, n.addresses, n.taints)
}

func describeAPI(n *corev1.Node) string {
	s := &node{
		name: n.Name, version: n.ResourceVersion, podCIDRs: n.Spec.PodCIDRs,
		initialEnd: n.Annotations[metav1.InitialEventsAnnotationKey] == "true",
	}
	if len(s.podCIDRs) == 0 && n.Spec.PodCIDR != "" {
		s.podCIDRs = []string{n.Spec.PodCIDR}
	}
	for _, t := range n.Spec.Taints {
		s.taints = append(s.taints, t.Key)
	}
	for _, a := range n.Status.Addresses {
		s.addresses = append(s.addresses, address{string(a.Type), a.Address})
	}
	return describe(s)
}

// Our decoder and that of the API's own types agree.
func TestUnmarshal(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		n := busyNode(random, i)
		if i%3 == 0 {
			n.Spec.PodCIDRs = nil
		}
		if i%5 == 0 {
			n.Annotations[metav1.InitialEventsAnnotationKey] = "true"
		}
		data, err := n.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got := &node{}
		if err := got.Unmarshal(data); err != nil || describe(got) != describeAPI(n) {
			t.Errorf("%s, want %s: %v", describe(got), describeAPI(n), err)
		}
		for range 50 { // no part of it and no damage does harm
			got.Reset()
			got.Unmarshal(data[:random.IntN(len(data))])
			bad := slices.Clone(data)
			bad[random.IntN(len(bad))] ^= byte(1 + random.IntN(255))
			got.Reset()
			got.Unmarshal(bad)
		}
	}
}

func FuzzUnmarshal(f *testing.F) {
	data, err := busyNode(rand.New(rand.NewPCG(1, 2)), 7).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		got, want := &node{}, &corev1.Node{}
		err, wantErr := got.Unmarshal(data), want.Unmarshal(data)
		// Each may refuse what the other takes: groups, which no message has, or fields that we skip.
		if wantErr == nil && err == nil && describe(got) != describeAPI(want) {
			t.Errorf("%s, want %s", describe(got), describeAPI(want))
		}
	})
}

func encodeList(t testing.TB, list *corev1.NodeList) []byte {
	t.Helper()
	raw, err := list.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data, err := (&runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, Raw: raw}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte(magic), data...)
}

func TestReadList(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	list := &corev1.NodeList{ListMeta: metav1.ListMeta{ResourceVersion: "77"}}
	for i := range 100 {
		list.Items = append(list.Items, *busyNode(random, i))
	}
	data := encodeList(t, list)
	var got []string
	version, err := readList(bytes.NewReader(data), func(n *node) { got = append(got, describe(n)) })
	if err != nil || version != "77" || len(got) != len(list.Items) {
		t.Fatalf("%d nodes, version %s, %v", len(got), version, err)
	}
	for i := range got {
		if want := describeAPI(&list.Items[i]); got[i] != want {
			t.Errorf("%s, want %s", got[i], want)
		}
	}
	// A part of a list is none, wherever it ends. Behind the list itself two empty fields follow.
	for size := 0; size < len(data)-4; size += 1 + random.IntN(300) {
		if _, err := readList(bytes.NewReader(data[:size]), func(*node) {}); err == nil {
			t.Errorf("%d of %d bytes were taken for a list", size, len(data))
		}
	}
	for range 2000 {
		bad := slices.Clone(data[:2000])
		bad[random.IntN(len(bad))] ^= byte(1 + random.IntN(255))
		readList(bytes.NewReader(bad), func(*node) {})
	}
}

// What a list costs is what is kept of it.
func BenchmarkDecode(b *testing.B) {
	data, err := busyNode(rand.New(rand.NewPCG(1, 2)), 7).Marshal()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			(&node{}).Unmarshal(data)
		}
	})
	b.Run("core/v1", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			(&corev1.Node{}).Unmarshal(data)
		}
	})
}
