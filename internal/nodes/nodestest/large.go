package nodestest

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Large is node i of a large cluster of both families, with all that kubelet, a cloud and
// their controllers write into it: 50 images, conditions, labels, managed fields.
func Large(i int) *corev1.Node {
	name := fmt.Sprintf("node-%05d.region.example.internal", i)
	n := Node(name, fmt.Sprintf("100.%d.%d.0/24,fd00:100:%x::/64", 64+i>>8, i&255, i),
		fmt.Sprintf("InternalIP=172.%d.%d.%d", 16+i>>16, i>>8&255, i&255), fmt.Sprintf("InternalIP=2001:db8:1::%x", i+1), "Hostname="+name)
	n.CreationTimestamp = metav1.NewTime(time.Unix(1_700_000_000, 0))
	n.Labels, n.Annotations = make(map[string]string), make(map[string]string)
	for j := range 20 {
		n.Labels[fmt.Sprintf("label-%02d.example.com/some-key", j)] = fmt.Sprintf("value-%d-%d", i, j)
	}
	for j := range 8 {
		n.Annotations[fmt.Sprintf("annotation-%02d.example.com/some-key", j)] = fmt.Sprintf("a longer value that a controller left here, number %d", j)
	}
	n.Spec.ProviderID = "cloud:///region/zone/instance-" + name
	n.Status.Capacity = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("64"), corev1.ResourceMemory: resource.MustParse("256Gi"), corev1.ResourcePods: resource.MustParse("250")}
	n.Status.Allocatable = n.Status.Capacity
	for _, c := range []corev1.NodeConditionType{"NetworkUnavailable", "MemoryPressure", "DiskPressure", "PIDPressure", "Ready"} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: c, Status: "False", Reason: "KubeletHasSufficient",
			Message: "kubelet has sufficient of it available", LastHeartbeatTime: n.CreationTimestamp, LastTransitionTime: n.CreationTimestamp})
	}
	for j := range 50 {
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{SizeBytes: int64(j) << 20, Names: []string{
			fmt.Sprintf("registry.example.com/project-%02d/image@sha256:%064d", j, j), fmt.Sprintf("registry.example.com/project-%02d/image:v1.%d.0", j, j)}})
	}
	n.Status.NodeInfo = corev1.NodeSystemInfo{KernelVersion: "6.12.0", OSImage: "Some Linux 12", KubeletVersion: "v1.36.3", Architecture: "amd64"}
	return n
}

// Beat is what a kubelet changes of its node with each status.
func Beat(n *corev1.Node, at time.Time) *corev1.Node {
	n = n.DeepCopy()
	for i := range n.Status.Conditions {
		n.Status.Conditions[i].LastHeartbeatTime = metav1.NewTime(at)
	}
	return n
}
