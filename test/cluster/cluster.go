package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Proxy is a mode of kube-proxy.
type Proxy string

// The modes that the nodes can use.
const (
	IPTables Proxy = "iptables"
	NFTables Proxy = "nftables"
)

// Options choose a cluster; the zero value has two nodes, ptp and iptables.
type Options struct {
	Kube  string // the binary that kube/build makes
	Helm  string
	Nodes int
	CNI   CNI
	Proxy Proxy
	// Images are archives of images that every node has from its start.
	Images []string
}

// namePrefix begins the names of directories and cgroups; the number of the process
// follows that made them.
const namePrefix = "bauta-cluster-"

// Cluster is a running cluster.
type Cluster struct {
	Dir    string // logs and state
	Fabric *Fabric
	API    *API

	opts  Options
	plane *controlPlane

	mu    sync.Mutex
	nodes []*Node
	last  int // number of the youngest node
}

// Start starts a cluster and returns when all nodes are ready.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.CNI == "" {
		o.CNI = PTP
	}
	if o.Proxy == "" {
		o.Proxy = IPTables
	}
	if err := sweepCgroups(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", namePrefix, os.Getpid()))
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: dir, opts: o}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cluster: %w", err), errors.New(c.Logs()), c.stop())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) (err error) {
	if err := c.gatherImages(); err != nil {
		return err
	}
	if c.Fabric, err = newFabric(); err != nil {
		return err
	}
	if c.plane, err = startControlPlane(ctx, c.opts.Kube, c.Dir, c.Fabric); err != nil {
		return err
	}
	c.API = c.plane.api()
	for range c.opts.Nodes {
		if _, err := c.AddNode(ctx); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes() {
		if err := n.AwaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// AddNode starts another node, which has taints from its beginning, and does not
// wait until it is ready.
func (c *Cluster) AddNode(ctx context.Context, taints ...string) (*Node, error) {
	if c.last == maxNodes {
		return nil, fmt.Errorf("add a node: there were %d already", maxNodes)
	}
	c.last++
	n, err := c.newNode(ctx, c.last, taints)
	if err != nil {
		return nil, err
	}
	if err := n.Boot(); err != nil {
		return nil, err
	}
	if err := c.Fabric.learn(n); err != nil {
		return nil, errors.Join(err, n.PowerOff())
	}
	for _, other := range c.Nodes() {
		if other.Running() {
			if err := other.routeTo(n); err != nil {
				return nil, errors.Join(err, n.PowerOff())
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = append(c.nodes, n)
	return n, nil
}

// RemoveNode ends a node for good: it is switched off, and it and its pods are
// deleted from the API, as a cloud's controller does.
func (c *Cluster) RemoveNode(ctx context.Context, n *Node) error {
	c.mu.Lock()
	c.nodes = slices.DeleteFunc(c.nodes, func(x *Node) bool { return x == n })
	c.mu.Unlock()
	err := errors.Join(n.PowerOff(), c.API.Delete(ctx, "/api/v1/nodes/"+n.Name))
	_, pods := c.Kubectl(ctx, "", "delete", "pods", "--all-namespaces", "--field-selector=spec.nodeName="+n.Name, "--force", "--grace-period=0")
	return errors.Join(err, pods)
}

// Nodes lists the nodes, oldest first.
func (c *Cluster) Nodes() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes)
}

// CutAPI takes the API server off the network, or puts it back.
func (c *Cluster) CutAPI(off bool) error { return c.Fabric.Cut(plane, off) }

// images is the directory that nodes import at their start.
func (c *Cluster) images() string { return filepath.Join(c.Dir, "images") }

func (c *Cluster) gatherImages() error {
	if err := os.Mkdir(c.images(), 0o755); err != nil {
		return err
	}
	for _, archive := range c.opts.Images {
		path, err := filepath.Abs(archive)
		if err != nil {
			return err
		}
		if err := os.Symlink(path, filepath.Join(c.images(), filepath.Base(path))); err != nil {
			return err
		}
	}
	return nil
}

// troubles are what errors of Kubernetes' components begin with.
var troubles = []string{"E1", "F1", "panic", "level=error", "level=fatal", " ended: "}

// Logs returns the ends of the components' logs, as far as they tell of troubles.
func (c *Cluster) Logs() string {
	var b strings.Builder
	fmt.Fprintf(&b, "logs are in %s\n", c.Dir)
	for _, pattern := range []string{"*.log", "*/*.log"} {
		files, _ := filepath.Glob(filepath.Join(c.Dir, pattern)) // the pattern is right
		for _, f := range files {
			if text := tail(f, 5, troubles...); text != "" {
				rel, _ := filepath.Rel(c.Dir, f)
				fmt.Fprintf(&b, "--- %s\n%s", rel, text)
			}
		}
	}
	return b.String()
}

// stop ends all processes and removes all namespaces and cgroups; logs stay.
func (c *Cluster) stop() error {
	var errs []error
	for _, n := range c.Nodes() {
		errs = append(errs, n.PowerOff())
	}
	if c.plane != nil {
		errs = append(errs, c.plane.close())
	}
	if c.Fabric != nil {
		errs = append(errs, c.Fabric.Close())
	}
	return errors.Join(errs...)
}

// Close ends the cluster and, unless keep is set, removes its logs and state.
func (c *Cluster) Close(keep bool) error {
	err := c.stop()
	if keep {
		return err
	}
	return errors.Join(err, os.RemoveAll(c.Dir))
}
