// Package nodes knows the cluster's Node objects: the pod ranges of this node, those of all
// others, and their addresses. It alone talks to the API server.
//
// It lists and watches Nodes, and nothing else. Of each it keeps a name, pod ranges and
// addresses: the rest is never decoded, so that a large cluster costs little memory. What is
// known is replaced only by a complete list, and changed only by what a watch says. An API
// server that is away, refuses, stalls or answers rubbish leaves it as it is.
package nodes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// Options says which cluster, and which of its nodes this is.
type Options struct {
	Kubeconfig string // path; empty: in-cluster
	NodeName   string
	UserAgent  string
	Log        *slog.Logger // zero: no log
}

// Snapshot is what is known at one time. It is never changed afterwards.
type Snapshot struct {
	Synced     bool           // a complete list was read once
	LastSync   time.Time      // when the API server last confirmed all this
	Own        []netip.Prefix // pod ranges of this node; those of before while its Node object has none
	Pods       []policy.Rule  // pod ranges of all other nodes
	Nodes      []policy.NodeAddr
	Known      int       // Node objects
	Taints     []string  // keys of the taints of this node
	Unranged   bool      // the Node object of this node is there, and has no pod ranges
	Problem    string    // what is wrong with the Node object of this node
	Rejected   []string  // what other Node objects say that can't be meant
	LostEvents uint64    // Events that could not be sent
	Error      string    // why the API server can't be asked now
	Since      time.Time // since when
}

// Client knows the Node objects of a cluster.
type Client struct {
	rest   rest.Interface
	name   string
	log    *slog.Logger
	timing timing
	state  *state
	events *eventQueue
}

// Open reads the configuration. It does not ask the API server for anything.
func Open(o Options) (*Client, error) {
	if o.NodeName == "" {
		return nil, advice.New(errors.New("enable-k8s: the name of this node is not known"),
			"give the name of its Node object with k8s-node-name, or in the environment as K8S_NODE_NAME (in a DaemonSet: fieldRef spec.nodeName)")
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	bridge(log)
	cfg, err := configuration(o.Kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := connect(cfg, o.UserAgent)
	switch {
	case err != nil && o.Kubeconfig != "":
		return nil, unusable(o.Kubeconfig, err)
	case err != nil:
		return nil, fmt.Errorf("enable-k8s: %w", err)
	}
	return &Client{
		rest: client, name: o.NodeName, log: log, timing: defaultTiming,
		state: newState(o.NodeName), events: newEventQueue(eventSender(client, o.NodeName)),
	}, nil
}

func configuration(path string) (*rest.Config, error) {
	if path == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, advice.New(fmt.Errorf("enable-k8s: in-cluster configuration: %w", err),
				"outside of a pod give a file with k8s-kubeconfig-path",
				"in a pod the service account's token has to be mounted (automountServiceAccountToken)")
		}
		return cfg, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, advice.New(fmt.Errorf("k8s-kubeconfig-path %s: %w", path, advice.Bare(err)), "name a kubeconfig file, or leave the option out in a pod")
	}
	if _, err := clientcmd.Load(data); err != nil {
		// The rest is about types of Go.
		what, _, _ := strings.Cut(err.Error(), "; json parse error")
		return nil, unusable(path, fmt.Errorf("not a kubeconfig: %s", what))
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if clientcmd.IsEmptyConfig(err) {
		err = errors.New("no current context, or none with a cluster")
	}
	if err != nil {
		return nil, unusable(path, err)
	}
	return cfg, nil
}

func unusable(kubeconfig string, err error) error {
	return advice.New(fmt.Errorf("k8s-kubeconfig-path %s: %w", kubeconfig, err),
		"the file needs a current context with a cluster and a user: kubectl --kubeconfig "+kubeconfig+" get nodes")
}

var (
	coreV1   = schema.GroupVersion{Version: "v1"}
	nodeKind = coreV1.WithKind("Node")
)

// connect makes a client for core/v1. Its scheme has our Node and nothing else: the types of
// the API would be half of the binary.
func connect(cfg *rest.Config, userAgent string) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	scheme.AddKnownTypeWithName(nodeKind, &node{})
	metav1.AddToGroupVersion(scheme, coreV1)
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath, cfg.GroupVersion = "/api", &coreV1
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON // in this order
	cfg.QPS = -1                                                                         // there are few requests, each with a pause of its own
	cfg.WarningHandler = rest.NoWarnings{}
	if userAgent != "" {
		cfg.UserAgent = userAgent
	}
	return rest.RESTClientFor(cfg)
}

// Snapshot returns what is known now.
func (c *Client) Snapshot() Snapshot {
	s := c.state.snapshot()
	s.LostEvents = c.LostEvents()
	return s
}

// Watch follows the Node objects until ctx is done, then returns nil. changed says only that
// Snapshot gives another one; it must not block.
func (c *Client) Watch(ctx context.Context, changed func()) error {
	c.state.changed = changed
	c.follow(ctx)
	return nil
}

// Own asks the API server for the pod ranges of this node, once.
func (c *Client) Own(ctx context.Context) ([]netip.Prefix, error) {
	n := &node{}
	if err := c.rest.Get().Resource("nodes").Name(c.name).MaxRetries(0).Do(ctx).Into(n); err != nil {
		return nil, fmt.Errorf("node %s: %s", c.name, brief(err))
	}
	m := newMember(n, true)
	if len(m.pods) == 0 {
		return nil, fmt.Errorf("node %s: its Node object has no podCIDRs", c.name)
	}
	return m.pods, nil
}
