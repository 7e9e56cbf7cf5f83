package nodes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A list in JSON is what the same in protobuf is; a part or a damaged one is none.
func TestReadJSONList(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	list := &corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "77"}}
	var want []string
	for i := range 15 {
		n := busyNode(random, i)
		if i%3 == 0 {
			n.Spec.PodCIDRs = nil
		}
		list.Items = append(list.Items, *n)
		want = append(want, describeAPI(n))
	}
	data, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	version, err := readList(bytes.NewReader(data), func(n *node) { got = append(got, describe(n)) })
	if err != nil || version != "77" || !slices.Equal(got, want) {
		t.Fatalf("version %s, %v\n%q\nwant\n%q", version, err, got, want)
	}
	for size := 0; size < len(data); size += 1 + random.IntN(300) {
		if _, err := readList(bytes.NewReader(data[:size]), func(*node) {}); err == nil {
			t.Errorf("%d of %d bytes were taken for a list", size, len(data))
		}
	}
	for range 2000 {
		bad := slices.Clone(data[:3000])
		bad[random.IntN(len(bad))] ^= byte(1 + random.IntN(255))
		readList(bytes.NewReader(bad), func(*node) {})
	}
	for _, c := range []struct{ text, want string }{
		{`{"kind":"Node","apiVersion":"v1","metadata":{"name":"a"}}`, `a "Node" instead of a NodeList`},
		{`{"kind":"PodList","items":[{"metadata":{"name":"p"}}]}`, `a "PodList" instead of a NodeList`},
		{`{}`, `a "" instead of a NodeList`},
		{`{"items":[{}]}`, "without a name"},
		{`{"items":7}`, "7 instead of a list"},
		{`{"items":[{"metadata":{"name":7}}]}`, "json: cannot unmarshal"},
		{`{"items":["` + strings.Repeat("x", 2*maxNode) + `"]}`, "more than"},
		{`{"items":null,"` + strings.Repeat("x", 2*maxNode), "more than"},
	} {
		if _, err := readList(strings.NewReader(c.text), func(*node) {}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.60s: %v, want %q", c.text, err, c.want)
		}
	}
}

// plainServer knows JSON, a list and a watch, and none of the finer points.
type plainServer struct {
	mu       sync.Mutex
	nodes    map[string]*corev1.Node
	watchers map[chan string]bool
	versions bool // objects have resource versions
	noWatch  bool // a watch ends at once
	version  int
}

func (s *plainServer) put(name, podCIDR, addr string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Spec.PodCIDR = podCIDR
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}}
	typ := "ADDED"
	if s.nodes[name] != nil {
		typ = "MODIFIED"
	}
	if s.version++; s.versions {
		n.ResourceVersion = fmt.Sprint(s.version)
	}
	s.nodes[name] = n
	object, _ := json.Marshal(n)
	for w := range s.watchers {
		w <- fmt.Sprintf(`{"type":%q,"object":%s}`+"\n", typ, object)
	}
}

func (s *plainServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Query().Get("watch") == "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}}
		if s.versions {
			list.ResourceVersion = fmt.Sprint(s.version)
		}
		for _, n := range s.nodes {
			list.Items = append(list.Items, *n)
		}
		json.NewEncoder(w).Encode(list)
		return
	}
	if s.noWatch {
		return
	}
	events := make(chan string, 16)
	s.mu.Lock()
	s.watchers[events] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, events)
	}()
	flush := http.NewResponseController(w)
	flush.Flush()
	for {
		select {
		case e := <-events:
			io.WriteString(w, e)
			flush.Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// What is between us and the API server, or stands for it, may know JSON only.
func TestPlainServer(t *testing.T) {
	for name, api := range map[string]*plainServer{
		"versions":    {versions: true},
		"no versions": {},
		"no watch":    {versions: true, noWatch: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api.nodes, api.watchers = make(map[string]*corev1.Node), make(map[chan string]bool)
			api.put("a", "10.0.1.0/24", "192.0.2.1")
			api.put("b", "10.0.2.0/24", "192.0.2.2")
			server := httptest.NewServer(api)
			t.Cleanup(server.Close)
			r := &rig{t: t, http: server}
			var err error
			if r.Client, err = Open(Options{Kubeconfig: writeConfig(t, server.URL), NodeName: "a"}); err != nil {
				t.Fatal(err)
			}
			r.timing = quick
			if name == "no versions" { // the next list is how it is seen what went while nobody watched
				r.timing.quiet = time.Second
			}
			r.start()
			await := func(want func(Snapshot) bool) {
				t.Helper()
				for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
					s := r.Snapshot()
					if want(s) {
						return
					} else if time.Now().After(deadline) {
						t.Fatalf("never:\n%s\n%s", text(s), s.Error)
					}
				}
			}
			await(func(s Snapshot) bool { return s.Synced && len(s.Own) == 1 && len(s.Pods) == 1 })
			if !api.noWatch {
				await(func(Snapshot) bool { api.mu.Lock(); defer api.mu.Unlock(); return len(api.watchers) > 0 })
			}
			api.put("c", "10.0.3.0/24", "192.0.2.3")
			api.put("b", "10.0.2.0/24", "192.0.2.9")
			await(func(s Snapshot) bool { return len(s.Pods) == 2 && strings.Contains(text(s), "192.0.2.9 b") })
		})
	}
}
