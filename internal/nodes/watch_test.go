package nodes

import (
	"net/http"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

func synced(s Snapshot) bool  { return s.Synced && s.Error == "" }
func failing(s Snapshot) bool { return s.Error != "" }

func TestWatchFollows(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.start()
	r.awaitText(onlyB)
	r.api.Put(nodeC)
	r.awaitText(bAndC)
	r.api.Delete("c")
	r.awaitText(onlyB)
	r.api.Put(nodestest.Node("b", "10.0.9.0/24", "InternalIP=192.0.2.9"))
	r.awaitText(ownText + `
		pods 10.0.9.0/24 node b
		address 192.0.2.9 b InternalIP node b`)
	if got := strings.Join(r.api.Requests(), ", "); got != "watch initial" {
		t.Errorf("requests %s", got)
	}
}

// What changes nothing that is of use, as the heartbeats of kubelets, is no news.
func TestHeartbeatsAreNoNews(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.start()
	r.await("synced", synced)
	before := r.changes.Load()
	for i := range 50 {
		n := nodeB.DeepCopy()
		n.Annotations = map[string]string{"beat": strings.Repeat("x", i)}
		r.api.Put(n)
	}
	r.api.Put(nodeC)
	r.awaitText(bAndC)
	if n := r.changes.Load() - before; n != 1 {
		t.Errorf("%d changes, want 1", n)
	}
}

// Servers that don't begin a watch with what there is are listed, once: those that say so,
// and those that don't know of it.
func TestListing(t *testing.T) {
	for name, old := range map[string]func(*nodestest.Server){
		"refuses": func(s *nodestest.Server) { s.NoInitialEvents = true },
		"ignores": func(s *nodestest.Server) { s.IgnoreInitialEvents = true },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nodeA, nodeB)
			old(r.api)
			r.start()
			r.awaitText(onlyB)
			r.api.Put(nodeC)
			r.awaitText(bAndC)
			if got := strings.Join(r.api.Requests(), ", "); got != "watch initial, list 0, watch 1002" {
				t.Errorf("requests %s", got)
			}
		})
	}
}

// A watch that ends goes on where it was.
func TestResume(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.start()
	r.await("synced", synced)
	for i := range 3 {
		r.api.Cut()
		r.wait(func() bool { return r.requests("watch 10") == i+1 })
	}
	r.api.Put(nodeC)
	r.awaitText(bAndC)
	if n := r.requests("watch initial"); n != 1 {
		t.Errorf("listed %d times", n)
	}
}

// What happened while the history was lost is known after 410, and until then nothing is lost.
func TestGone(t *testing.T) {
	for _, how := range []string{"refused", "event"} {
		for _, listing := range []bool{false, true} {
			r := newRig(t, nodeA, nodeB)
			r.api.NoInitialEvents = listing
			r.start()
			r.awaitText(onlyB)
			r.api.SetFault(nodestest.Status(apierrors.NewServiceUnavailable("away")))
			if how == "event" {
				r.api.Expire()
			} else {
				r.api.Cut()
			}
			r.await("failing", failing)
			r.api.Put(nodeC)
			r.api.Compact()
			if got := text(r.Snapshot()); got != onlyB {
				t.Errorf("while it is away:\n%s", got)
			}
			r.api.SetFault(nil)
			r.awaitText(bAndC)
		}
	}
}

// Whose API server can't begin a watch with what there is, for whatever reason, lists.
func TestNoInitialEventsForNow(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.api.SetFault(nodestest.InternalEvent)
	r.start()
	r.awaitText(onlyB)
}

// A server with another, shorter history is believed, not waited for. It does not refuse a watch
// from a version that it has not reached: it says nothing, not even a bookmark.
func TestRestoredFromAnOldCopy(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.Client.timing.quiet = 200 * time.Millisecond
	r.start()
	r.awaitText(onlyB)
	r.api.SetFault(nodestest.Status(apierrors.NewServiceUnavailable("away")))
	r.api.Cut()
	r.await("failing", failing)
	r.api.Restore(7, nodeA, nodeC)
	r.api.SetFault(nil)
	r.awaitText(ownText + `
		pods 10.0.3.0/24 node c
		address 192.0.2.3 c InternalIP node c
		address 2001:db8::3 c InternalIP node c`)
}

// Whatever the server does: what is known stays, it is said what is wrong and since when, and
// all is well as soon as the server is.
func TestFaults(t *testing.T) {
	nodes := schema.GroupResource{Resource: "nodes"}
	for name, c := range map[string]struct {
		fault nodestest.Fault
		want  string
	}{
		"forbidden":    {nodestest.Status(apierrors.NewForbidden(nodes, "", nil)), "forbidden"},
		"unauthorized": {nodestest.Status(apierrors.NewUnauthorized("token expired")), "token expired"},
		"internal":     {nodestest.Status(apierrors.NewInternalError(http.ErrBodyNotAllowed)), "Internal error"},
		"busy":         {nodestest.Status(apierrors.NewTooManyRequests("busy", 0)), "busy"},
		"garbage":      {nodestest.Answer("application/vnd.kubernetes.protobuf;stream=watch", strings.Repeat("garbage", 1000)), "nodes:"},
		"page":         {nodestest.Answer("text/html", "<html>log in</html>"), "nodes: the answer is text/html, not that of an API server"},
		"JSON":         {nodestest.Answer("application/json", `{"kind":"NodeList","apiVersion":"v1","items":[]}`), "no node at all"},
		"JSON of pods": {nodestest.Answer("application/json", `{"kind":"PodList","apiVersion":"v1","items":[]}`), `nodes: a "PodList"`},
		"nothing":      {nodestest.Answer("application/vnd.kubernetes.protobuf;stream=watch", ""), "nodes:"},
		"stall":        {nodestest.Stall, "says nothing for"},
	} {
		for _, listing := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, nodeA, nodeB)
				r.api.NoInitialEvents = listing
				r.api.SetFault(c.fault)
				start := time.Now()
				r.start()
				s := r.await("failing at the start", failing)
				if s.Synced || !strings.Contains(s.Error, c.want) || s.Since.Before(start) {
					t.Errorf("%q since %s, want %q", s.Error, s.Since, c.want)
				}
				r.api.SetFault(nil)
				r.awaitText(onlyB)
				r.await("well", synced)

				r.api.SetFault(c.fault)
				r.api.Cut()
				r.await("failing later", failing)
				if got := text(r.Snapshot()); got != onlyB {
					t.Errorf("while it fails:\n%s", got)
				}
				r.api.Put(nodeC)
				r.api.SetFault(nil)
				r.awaitText(bAndC)
				r.await("well again", synced)
			})
		}
	}
}

// A list that breaks off, at any byte, is no list.
func TestPartialList(t *testing.T) {
	for _, listing := range []bool{false, true} {
		r := newRig(t, nodeA, nodeB)
		r.api.NoInitialEvents = listing
		r.start()
		r.awaitText(onlyB)
		r.api.Put(nodeC)
		r.awaitText(bAndC)
		for limit := 0; limit < 1500; limit += 100 {
			r.api.SetFault(nodestest.CutAfter(r.api, limit))
			r.api.Compact()
			r.api.Cut()
			r.await("failing", failing)
			if got := text(r.Snapshot()); got != bAndC {
				t.Fatalf("after %d bytes of a list:\n%s", limit, got)
			}
			r.api.SetFault(nil)
			r.await("well", synced)
		}
	}
}

// A server without a node is one that has lost them.
func TestEmptyList(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.start()
	r.awaitText(onlyB)
	r.api.Restore(2000)
	r.api.Cut()
	s := r.await("not believed", func(s Snapshot) bool { return strings.Contains(s.Error, "no node at all") })
	if text(s) != onlyB {
		t.Errorf("%q:\n%s", s.Error, text(s))
	}
	r.api.Put(nodeA, nodeC)
	r.await("well", func(s Snapshot) bool { return s.Error == "" && s.Known == 2 })
}

// A connection that is cut in the middle of the night is noticed.
func TestSilentWatch(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.Client.timing.quiet = 100 * time.Millisecond
	r.start()
	r.await("synced", synced)
	r.wait(func() bool { return r.requests("watch 10") > 1 })
	r.api.Put(nodeC)
	r.awaitText(bAndC)
}

// Retries become rare, and are not all at once: pauses double, and are half to one and a half
// times that.
func TestBackOff(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.Client.timing.retry, r.Client.timing.maxRetry = 20*time.Millisecond, 160*time.Millisecond
	times := make(chan time.Time, 100)
	r.api.SetFault(func(w http.ResponseWriter, q *http.Request) bool {
		times <- time.Now()
		return nodestest.Status(apierrors.NewServiceUnavailable("away"))(w, q)
	})
	r.start()
	last := <-times
	for i, pause := range []time.Duration{20, 40, 80, 160, 160, 160} {
		now := <-times
		if got, least := now.Sub(last), pause*time.Millisecond/2; got < least {
			t.Errorf("pause %d: %s, want %s at least", i, got, least)
		}
		last = now
	}
}

// A server that asks for a longer pause gets it.
func TestRetryAfter(t *testing.T) {
	r := newRig(t, nodeA, nodeB)
	r.Client.timing.maxRetry = time.Second
	r.api.SetFault(nodestest.Status(apierrors.NewTooManyRequests("busy", 1)))
	start := time.Now()
	r.start()
	r.await("busy", failing)
	r.api.SetFault(nil)
	r.await("well", synced)
	if took := time.Since(start); took < time.Second {
		t.Errorf("asked again after %s", took)
	}
}
