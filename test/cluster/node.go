package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
)

// Node is a node of the cluster.
type Node struct {
	Name string
	Addr lab.Pair
	Pods []netip.Prefix // its podCIDRs, IPv4 first

	cluster *Cluster
	spec    nodeSpec
	ns      *lab.NS
	init    *process
}

// newNode makes the node an object of the API and gets its pod ranges, as a cloud's
// controller does, before its kubelet is started.
func (c *Cluster) newNode(ctx context.Context, i int, taints []string) (*Node, error) {
	n := &Node{Name: nodeName(i), Addr: nodeAddr(i), cluster: c}
	type object = map[string]any
	list := []object{}
	for _, key := range taints {
		list = append(list, object{"key": key, "effect": "NoSchedule"})
	}
	err := c.API.Post(ctx, "/api/v1/nodes", object{"metadata": object{"name": n.Name}, "spec": object{"taints": list}})
	if err != nil {
		return nil, err
	}
	kubelet, err1 := c.plane.creds.kubeconfig("system:node:" + n.Name)
	proxy, err2 := c.plane.creds.kubeconfig("system:kube-proxy")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	dir := filepath.Join(c.Dir, n.Name)
	n.spec = nodeSpec{
		Name: n.Name, Dir: dir, Kube: c.opts.Kube, Images: c.images(), Cgroup: filepath.Base(c.Dir) + "-" + n.Name,
		KubeletConfig: kubelet, ProxyConfig: proxy, Addrs: n.Addr.V4.String() + "," + n.Addr.V6.String(),
		Proxy: string(c.opts.Proxy),
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := n.spec.writeConfig(); err != nil {
		return nil, err
	}
	err = poll(ctx, 30*time.Second, func() error {
		var object struct {
			Spec struct{ PodCIDRs []netip.Prefix }
		}
		if err := c.API.Get(ctx, "/api/v1/nodes/"+n.Name, &object); err != nil {
			return err
		}
		if n.Pods = object.Spec.PodCIDRs; len(n.Pods) != 2 {
			return fmt.Errorf("pod ranges %v: two expected", n.Pods)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Name, err)
	}
	return n, n.spec.writeCNI(c.opts.CNI, n.Pods, false)
}

// Boot starts the node, in new namespaces. The cluster's other nodes have a route to
// its pods, and it to theirs.
func (n *Node) Boot() (err error) {
	if n.ns, err = lab.NewNS(""); err != nil {
		return err
	}
	if err := n.boot(); err != nil {
		return errors.Join(fmt.Errorf("boot %s: %w", n.Name, err), n.PowerOff())
	}
	return nil
}

func (n *Node) boot() error {
	if err := n.cluster.Fabric.attach(n.ns, n.Addr); err != nil {
		return err
	}
	for _, kv := range [][2]string{
		{"net.ipv4.ip_forward", "1"}, {"net.ipv6.conf.all.forwarding", "1"},
		{"net.ipv4.conf.all.send_redirects", "0"}, {"net.ipv4.conf.default.send_redirects", "0"},
		{"net.ipv4.conf.eth0.send_redirects", "0"},
	} {
		if err := n.ns.Sysctl(kv[0], kv[1]); err != nil {
			return err
		}
	}
	for _, other := range n.cluster.Nodes() {
		if other != n {
			if err := n.routeTo(other); err != nil {
				return err
			}
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), specEnv+"="+filepath.Join(n.spec.Dir, "node.json"))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	n.init, err = start(n.ns, n.spec.Dir, "init", cmd)
	return err
}

// routeTo makes the other node the next hop to its pods.
func (n *Node) routeTo(other *Node) error {
	for _, p := range other.Pods {
		if err := n.ns.AddRoute(lab.Route{Dst: p, Via: other.Addr.Of(p.Addr())}); err != nil {
			return err
		}
	}
	return nil
}

// PowerOff ends all processes of the node at once, as pulling the plug does, and
// removes its namespaces. Its disk stays: Boot starts it again.
func (n *Node) PowerOff() error {
	err := n.init.kill()
	n.init = nil
	return errors.Join(err, n.ns.Close(), removeCgroups(n.spec.Cgroup))
}

// Running says that the node was started and has not ended.
func (n *Node) Running() bool { return n.init != nil && !n.init.ended() }

// NS is the node's network namespace. It is another one after a reboot.
func (n *Node) NS() *lab.NS { return n.ns }

// Dial connects from the node.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return dialFrom(n.ns)(ctx, network, address)
}

// Dir is where the node's logs are.
func (n *Node) Dir() string { return n.spec.Dir }

// Run runs a command on the node and returns what it wrote to its standard output.
func (n *Node) Run(ctx context.Context, argv ...string) (string, error) {
	if !n.Running() {
		return "", fmt.Errorf("run on %s: the node is off", n.Name)
	}
	args := append([]string{"--target", strconv.Itoa(n.init.cmd.Process.Pid), "--all", "--"}, argv...)
	var out, warnings strings.Builder
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Stdout, cmd.Stderr = &out, &warnings
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("run %q on %s: %w: %s", argv, n.Name, err, warnings.String())
	}
	return out.String(), nil
}

// ready returns nil if the API server says that the node is.
func (n *Node) ready(ctx context.Context) error {
	if !n.Running() {
		return stop{fmt.Errorf("%s ended:\n%s", n.Name, tail(filepath.Join(n.spec.Dir, "init.log"), 10))}
	}
	var object struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
			Addresses  []struct{ Address string }
		}
	}
	if err := n.cluster.API.Get(ctx, "/api/v1/nodes/"+n.Name, &object); err != nil {
		return err
	}
	for _, c := range object.Status.Conditions {
		if c.Type == "Ready" {
			if c.Status != "True" {
				return fmt.Errorf("%s is not ready: %s", n.Name, c.Message)
			}
			return nil
		}
	}
	return fmt.Errorf("%s is not ready: its kubelet has not said anything", n.Name)
}

// Taints returns the keys of the node's taints.
func (n *Node) Taints(ctx context.Context) (keys []string, err error) {
	var object struct {
		Spec struct{ Taints []struct{ Key string } }
	}
	err = n.cluster.API.Get(ctx, "/api/v1/nodes/"+n.Name, &object)
	for _, taint := range object.Spec.Taints {
		keys = append(keys, taint.Key)
	}
	return keys, err
}

// AwaitReady waits until the API server calls the node ready.
func (n *Node) AwaitReady(ctx context.Context) error {
	return poll(ctx, 2*time.Minute, func() error { return n.ready(ctx) })
}
