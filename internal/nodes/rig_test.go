package nodes

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

// quick is a timing for tests. quiet is longer than any of them takes to say something.
var quick = timing{
	answer: 300 * time.Millisecond, initial: 300 * time.Millisecond, quiet: 10 * time.Second, settle: 30 * time.Millisecond, spread: 10 * time.Millisecond,
	watch: time.Minute, retry: 5 * time.Millisecond, maxRetry: 50 * time.Millisecond,
}

// rig is a client and its API server.
type rig struct {
	*Client
	t       *testing.T
	api     *nodestest.Server
	http    *httptest.Server
	changes atomic.Int32
}

func newRig(t *testing.T, nodes ...*corev1.Node) *rig {
	t.Helper()
	r := &rig{t: t, api: nodestest.New()}
	r.api.Put(nodes...)
	r.http = httptest.NewServer(r.api)
	t.Cleanup(r.http.Close)
	t.Cleanup(r.api.Cut)
	c, err := Open(Options{Kubeconfig: writeConfig(t, r.http.URL), NodeName: "a", Log: slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	c.timing = quick
	r.Client = c
	return r
}

// testLog is silent when the test has ended: the library may log late.
type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	if l.t.Context().Err() == nil {
		l.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

func writeConfig(t *testing.T, url string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, []byte(nodestest.Kubeconfig(url, "secret")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// start follows the cluster until the test ends, or stop.
func (r *rig) start() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Watch(ctx, func() { r.changes.Add(1) }); err != nil {
			r.t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	r.t.Cleanup(stop)
	return stop
}

// await waits for a snapshot.
func (r *rig) await(what string, want func(Snapshot) bool) Snapshot {
	r.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		s := r.Snapshot()
		if want(s) {
			return s
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: never:\n%s\nrequests %q", what, text(s), r.api.Requests())
		}
		time.Sleep(time.Millisecond) // between looks
	}
}

// wait waits for any condition.
func (r *rig) wait(want func() bool) {
	r.t.Helper()
	r.await("condition", func(Snapshot) bool { return want() })
}

// awaitText waits for what is known.
func (r *rig) awaitText(want string) {
	r.t.Helper()
	want = strings.ReplaceAll(strings.TrimSpace(want), "\t", "")
	r.await(want, func(s Snapshot) bool { return text(s) == want })
}

// text is what is known.
func text(s Snapshot) string {
	var b strings.Builder
	if !s.Synced {
		b.WriteString("not synced\n")
	}
	for _, p := range s.Own {
		fmt.Fprintf(&b, "own %s\n", p)
	}
	for _, r := range s.Pods {
		fmt.Fprintf(&b, "pods %s %s\n", r.Prefix, r.Origin)
	}
	for _, n := range s.Nodes {
		fmt.Fprintf(&b, "address %s %s %s %s\n", n.Addr, n.Node, n.Type, n.Origin)
	}
	for _, text := range append(slices.Clone(s.Rejected), s.Problem) {
		if text != "" {
			b.WriteString(text + "\n")
		}
	}
	return strings.TrimSpace(b.String())
}

// requests are those that begin so.
func (r *rig) requests(prefix string) (n int) {
	for _, q := range r.api.Requests() {
		if strings.HasPrefix(q, prefix) {
			n++
		}
	}
	return n
}

var (
	nodeA = nodestest.Node("a", "10.0.1.0/24,fd00:1::/64", "InternalIP=192.0.2.1")
	nodeB = nodestest.Node("b", "10.0.2.0/24,fd00:2::/64", "InternalIP=192.0.2.2", "ExternalIP=203.0.113.2", "Hostname=b")
	nodeC = nodestest.Node("c", "10.0.3.0/24", "InternalIP=192.0.2.3", "InternalIP=2001:db8::3")
)

const (
	ownText = `own 10.0.1.0/24
own fd00:1::/64`
	textB = `pods 10.0.2.0/24 node b
pods fd00:2::/64 node b`
	addrsB = `address 192.0.2.2 b InternalIP node b
address 203.0.113.2 b ExternalIP node b`
	onlyB = ownText + "\n" + textB + "\n" + addrsB
	bAndC = ownText + "\n" + textB + "\npods 10.0.3.0/24 node c\n" + addrsB + `
address 192.0.2.3 c InternalIP node c
address 2001:db8::3 c InternalIP node c`
)
