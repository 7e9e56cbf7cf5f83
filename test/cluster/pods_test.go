package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster"
	"bauta.dev/bauta/test/cluster/talk"
)

// The pods that the tests share, by node, and the Services before them.
var (
	podOn  []*cluster.Pod // an ordinary pod each, the endpoints of the Services
	hostOn []*cluster.Pod // with the host's network
	second *cluster.Pod   // another one on the first node, with a hostPort
	alone  *cluster.Pod   // the only endpoint of the Service "alone", on the first node
)

const (
	hostPort     = 8500
	nodePort     = 30500 // externalTrafficPolicy Cluster
	nodePortHere = 30600 // Local, with the pod on the first node only
)

// services have both families. Their endpoints stay when a node is not ready, or
// tests that cut nodes off would measure kube-proxy.
const services = `
apiVersion: v1
kind: Service
metadata: {name: pods}
spec:
  type: NodePort
  publishNotReadyAddresses: true
  ipFamilyPolicy: RequireDualStack
  selector: {app: pod}
  ports:
    - {name: tcp, port: 80, targetPort: 7000, nodePort: 30500}
    - {name: udp, port: 80, targetPort: 7000, nodePort: 30500, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: alone}
spec:
  type: NodePort
  publishNotReadyAddresses: true
  externalTrafficPolicy: Local
  ipFamilyPolicy: RequireDualStack
  selector: {app: alone}
  ports:
    - {name: tcp, port: 80, targetPort: 7000, nodePort: 30600}
    - {name: udp, port: 80, targetPort: 7000, nodePort: 30600, protocol: UDP}
`

func startPods(ctx context.Context) error {
	if err := shared.Apply(ctx, services); err != nil {
		return err
	}
	app := map[string]string{"app": "pod"}
	for _, n := range shared.Nodes() {
		p, err := n.StartPod(ctx, cluster.PodOptions{Name: "pod-" + n.Name, Labels: app})
		if err != nil {
			return err
		}
		podOn = append(podOn, p)
		if p, err = n.StartPod(ctx, cluster.PodOptions{Name: "host-" + n.Name, HostNetwork: true}); err != nil {
			return err
		}
		hostOn = append(hostOn, p)
	}
	var err error
	if second, err = node(0).StartPod(ctx, cluster.PodOptions{Name: "second", HostPort: hostPort}); err != nil {
		return err
	}
	alone, err = node(0).StartPod(ctx, cluster.PodOptions{Name: "alone", Labels: map[string]string{"app": "alone"}})
	return err
}

// serviceAddr is the cluster address of a Service.
func serviceAddr(ctx context.Context, name string) (p lab.Pair, err error) {
	var object struct {
		Spec struct{ ClusterIPs []netip.Addr }
	}
	if err := shared.API.Get(ctx, "/api/v1/namespaces/default/services/"+name, &object); err != nil {
		return p, err
	}
	for _, a := range object.Spec.ClusterIPs {
		if a.Is4() {
			p.V4 = a
		} else {
			p.V6 = a
		}
	}
	if !p.V4.IsValid() || !p.V6.IsValid() {
		return p, fmt.Errorf("service %s: addresses %v", name, object.Spec.ClusterIPs)
	}
	return p, nil
}

// askFromOutside asks a server from an address of the outside.
func askFromOutside(ctx context.Context, proto string, to netip.AddrPort) (talk.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return talk.Ask(ctx, shared.Fabric.Dial, proto, to.String())
}
