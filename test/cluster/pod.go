package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster/talk"
)

// Ports of the workload program in a pod.
const (
	PodPort     = 7000 // TCP and UDP; HTTP has the next one
	controlPort = 9000
	hostOffset  = 100 // added in pods with the host's network
)

// PodOptions describe a pod of the workload program.
type PodOptions struct {
	Name   string
	Labels map[string]string
	// HostNetwork puts it into the node's own network.
	HostNetwork bool
	// Scheduled leaves it to the scheduler, which heeds taints, to bring the pod to
	// its node. Other pods are there whatever happens to the node.
	Scheduled bool
	// HostPort is a port of the node that leads to PodPort; 0 = none.
	HostPort int
}

// Pod is a pod of the workload program.
type Pod struct {
	Name string
	Node *Node
	Addr lab.Pair
	Port uint16 // of its TCP and UDP servers

	control uint16
}

// object is the pod as the API server takes it.
func (o PodOptions) object(node string) map[string]any {
	type object = map[string]any
	port, control := PodPort, controlPort
	if o.HostNetwork {
		port, control = port+hostOffset, control+hostOffset
	}
	container := object{
		"name": "workload", "image": WorkloadImage, "imagePullPolicy": "Never",
		"args": []string{"-port", strconv.Itoa(port), "-control", strconv.Itoa(control)},
		"env": []object{
			{"name": "POD_NAME", "value": o.Name},
			{"name": "POD_IPS", "valueFrom": object{"fieldRef": object{"fieldPath": "status.podIPs"}}},
		},
		"readinessProbe": object{
			"httpGet": object{"path": "/", "port": port + 1}, "periodSeconds": 1,
		},
	}
	if o.HostPort != 0 {
		container["ports"] = []object{
			{"containerPort": port, "hostPort": o.HostPort},
			{"containerPort": port, "hostPort": o.HostPort, "protocol": "UDP"},
		}
	}
	spec := object{
		"hostNetwork": o.HostNetwork, "terminationGracePeriodSeconds": 1,
		"automountServiceAccountToken": false, "containers": []object{container},
	}
	if o.Scheduled {
		spec["nodeSelector"] = object{"kubernetes.io/hostname": node}
	} else {
		spec["nodeName"], spec["tolerations"] = node, []object{{"operator": "Exists"}}
	}
	return object{"metadata": object{"name": o.Name, "labels": o.Labels}, "spec": spec}
}

const pods = "/api/v1/namespaces/default/pods"

// StartPod starts a pod on a node and waits until it is ready.
func (n *Node) StartPod(ctx context.Context, o PodOptions) (*Pod, error) {
	if err := n.cluster.API.Post(ctx, pods, o.object(n.Name)); err != nil {
		return nil, err
	}
	p := &Pod{Name: o.Name, Node: n, Port: PodPort, control: controlPort}
	if o.HostNetwork {
		p.Port, p.control = PodPort+hostOffset, controlPort+hostOffset
	}
	return p, p.AwaitReady(ctx)
}

// AwaitReady waits until the pod is ready, and takes up its addresses, which are
// others after a reboot of its node.
func (p *Pod) AwaitReady(ctx context.Context) error {
	err := poll(ctx, time.Minute, func() error {
		var object struct {
			Status struct {
				Phase      string
				PodIPs     []struct{ IP netip.Addr }
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := p.Node.cluster.API.Get(ctx, pods+"/"+p.Name, &object); err != nil {
			return err
		}
		for _, c := range object.Status.Conditions {
			if c.Type != "Ready" || c.Status != "True" {
				continue
			}
			for _, ip := range object.Status.PodIPs {
				if ip.IP.Is4() {
					p.Addr.V4 = ip.IP
				} else {
					p.Addr.V6 = ip.IP
				}
			}
			return nil
		}
		return fmt.Errorf("%s, conditions %v", object.Status.Phase, object.Status.Conditions)
	})
	if err != nil {
		return fmt.Errorf("pod %s on %s: %w", p.Name, p.Node.Name, err)
	}
	return nil
}

// Delete deletes the pod and waits until it is gone.
func (p *Pod) Delete(ctx context.Context) error {
	if err := p.Node.cluster.API.Delete(ctx, pods+"/"+p.Name); err != nil {
		return err
	}
	return poll(ctx, time.Minute, func() error {
		if err := p.Node.cluster.API.Get(ctx, pods+"/"+p.Name, nil); !NotFound(err) {
			return errors.Join(fmt.Errorf("pod %s: still there", p.Name), err)
		}
		return nil
	})
}

// Ask has the pod ask a server over "tcp", "udp" or "http".
func (p *Pod) Ask(ctx context.Context, proto string, to netip.AddrPort) (a talk.Answer, err error) {
	err = p.order(ctx, http.MethodGet, "/ask?"+url.Values{"proto": {proto}, "to": {to.String()}}.Encode(), &a)
	return a, err
}

// Ping has the pod send one ICMP echo request, and fails without an answer.
func (p *Pod) Ping(ctx context.Context, to netip.Addr) error {
	return p.order(ctx, http.MethodGet, "/ping?"+url.Values{"to": {to.String()}}.Encode(), nil)
}

// Hold has the pod begin a talk.Hold of n connections.
func (p *Pod) Hold(ctx context.Context, name string, to netip.AddrPort, n int) error {
	return p.order(ctx, http.MethodPut, "/hold/"+name+"?"+url.Values{"to": {to.String()}, "n": {strconv.Itoa(n)}}.Encode(), nil)
}

// Held says how a hold goes.
func (p *Pod) Held(ctx context.Context, name string) (r talk.Report, err error) {
	err = p.order(ctx, http.MethodGet, "/hold/"+name, &r)
	return r, err
}

// Release ends a hold and says how it went.
func (p *Pod) Release(ctx context.Context, name string) (r talk.Report, err error) {
	err = p.order(ctx, http.MethodDelete, "/hold/"+name, &r)
	return r, err
}

// order sends an order to the pod's control port, from its node: that way passes no
// masquerade device.
func (p *Pod) order(ctx context.Context, method, path string, out any) error {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: dialFrom(p.Node.ns), DisableKeepAlives: true,
	}}
	r, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://%s%s", netip.AddrPortFrom(p.Addr.V4, p.control), path), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(r)
	if err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("pod %s: %s", p.Name, strings.TrimSpace(string(answer)))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}
