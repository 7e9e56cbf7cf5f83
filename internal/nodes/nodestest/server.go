// Package nodestest is a small API server for tests: Nodes with list, watch, history and
// protobuf, Events, and faults on demand.
//
// It speaks what kube-apiserver does of these, with the types of k8s.io/api, so that the code
// under test meets the real encoding. It is an http.Handler: a test listens where it needs to.
package nodestest

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// Fault answers a request in the place of the server, or returns false to let it answer.
type Fault func(http.ResponseWriter, *http.Request) bool

// Server is an API server with one kind of objects. The zero value works.
type Server struct {
	// NoInitialEvents refuses to begin a watch with what there is, as servers before 1.32 do.
	NoInitialEvents bool
	// IgnoreInitialEvents does not see that this is asked for, as servers before 1.27.
	IgnoreInitialEvents bool

	mu       sync.Mutex
	nodes    map[string]*corev1.Node
	version  int
	oldest   int     // a watch from before is refused
	history  []event // after oldest, by version
	news     chan struct{}
	cut      chan struct{}
	expire   chan struct{}
	fault    Fault
	requests []string
	bytes    atomic.Int64
	events   map[string]*corev1.Event
	posts    int
}

type event struct {
	version int
	typ     watch.EventType
	node    *corev1.Node
}

// New is a server without a node.
func New() *Server {
	return &Server{
		nodes: make(map[string]*corev1.Node), version: 1000, oldest: 1000,
		news: make(chan struct{}), cut: make(chan struct{}), expire: make(chan struct{}), events: make(map[string]*corev1.Event),
	}
}

// Node makes a Node object: pod ranges separated by commas, and addresses as "TYPE=ADDRESS".
func Node(name, podCIDRs string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}}
	if podCIDRs != "" {
		n.Spec.PodCIDRs = strings.Split(podCIDRs, ",")
		n.Spec.PodCIDR = n.Spec.PodCIDRs[0]
	}
	for _, a := range addresses {
		kind, text, _ := strings.Cut(a, "=")
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeAddressType(kind), Address: text})
	}
	return n
}

// Kubeconfig is a file for a server at url.
func Kubeconfig(url, token string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q}}]
users: [{name: test, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`, url, token)
}

// Put adds or changes nodes.
func (s *Server) Put(nodes ...*corev1.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range nodes {
		s.put(n)
	}
	s.wake()
}

func (s *Server) put(n *corev1.Node) *corev1.Node {
	typ := watch.Modified
	if s.nodes[n.Name] == nil {
		typ = watch.Added
	}
	s.version++
	n = n.DeepCopy()
	n.ResourceVersion = strconv.Itoa(s.version)
	s.nodes[n.Name] = n
	s.history = append(s.history, event{s.version, typ, n})
	return n
}

// Delete removes nodes.
func (s *Server) Delete(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		n := s.nodes[name]
		if n == nil {
			continue
		}
		s.version++
		n = n.DeepCopy()
		n.ResourceVersion = strconv.Itoa(s.version)
		delete(s.nodes, name)
		s.history = append(s.history, event{s.version, watch.Deleted, n})
	}
	s.wake()
}

func (s *Server) wake() {
	close(s.news)
	s.news = make(chan struct{})
}

// Get is a node as it is now; nil: there is none.
func (s *Server) Get(name string) *corev1.Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[name].DeepCopy()
}

// Compact forgets what was: a watch from an earlier version is refused with 410.
func (s *Server) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.oldest, s.history = s.version, nil
}

// Restore makes this the server of another history: an old copy with these nodes.
func (s *Server) Restore(version int, nodes ...*corev1.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes, s.version, s.oldest, s.history = make(map[string]*corev1.Node), version, version, nil
	for _, n := range nodes {
		s.put(n)
	}
	s.wake()
}

// Cut ends all requests that are under way, without a word.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.cut)
	s.cut = make(chan struct{})
}

// Expire ends all watches with an error event: too old.
func (s *Server) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.expire)
	s.expire = make(chan struct{})
}

// SetFault makes requests to come fail; nil ends that.
func (s *Server) SetFault(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Requests are those so far, a line each: "list 0", "watch 1005", "watch initial".
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Bytes is how many bytes of answers were written.
func (s *Server) Bytes() int64 { return s.bytes.Load() }

// ServeHTTP answers for /api/v1/nodes and the events of a namespace.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	fault := s.fault
	s.mu.Unlock()
	if fault == nil || !fault(w, r) {
		s.answer(w, r)
	}
}

// answer answers without a fault.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	cut := s.cut
	s.mu.Unlock()
	w = &counter{w, s}
	path := strings.TrimPrefix(r.URL.Path, "/api/v1/")
	name, one := strings.CutPrefix(path, "nodes/")
	q := r.URL.Query()
	switch {
	case one:
		s.serveNode(w, r, name)
	case path == "nodes" && q.Get("watch") == "true":
		s.watch(w, r, cut)
	case path == "nodes":
		s.note("list " + q.Get("resourceVersion"))
		s.list(w)
	case strings.Contains(path, "/events"):
		s.serveEvents(w, r)
	default:
		fail(w, r, apierrors.NewNotFound(schema.GroupResource{Resource: path}, ""))
	}
}

func (s *Server) note(request string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, strings.TrimSpace(request))
}

func (s *Server) sorted() []*corev1.Node {
	var list []*corev1.Node
	for _, name := range slices.Sorted(maps.Keys(s.nodes)) {
		list = append(list, s.nodes[name])
	}
	return list
}

func (s *Server) list(w http.ResponseWriter) {
	s.mu.Lock()
	list := &corev1.NodeList{ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(s.version)}}
	for _, n := range s.sorted() {
		list.Items = append(list.Items, *n)
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", protobufType)
	w.Write(encode("NodeList", list))
}

// counter counts what is written.
type counter struct {
	http.ResponseWriter
	s *Server
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.s.bytes.Add(int64(n))
	return n, err
}

func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
