package nodes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

// startEvents sends events until the test ends.
func (r *rig) startEvents() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.RunEvents(ctx)
	}()
	r.t.Cleanup(func() { cancel(); <-done })
}

func TestEventsReachTheServer(t *testing.T) {
	r := newRig(t, nodeA)
	r.startEvents()
	for range 3 {
		r.Event(Event{Warning: true, Reason: "ConfigInvalid", Message: "file f: bad"})
	}
	r.Event(Event{Reason: "ConfigApplied", Message: strings.Repeat("é", 5000)})
	r.wait(func() bool { return len(r.api.Events()) == 2 })
	r.Event(Event{Warning: true, Reason: "ConfigInvalid", Message: "file f: bad"})
	r.wait(func() bool {
		return strings.Contains(strings.Join(r.api.Events(), "\n"), "Warning ConfigInvalid a x4: file f: bad")
	})
	if got := r.api.Events(); len(got) != 2 || r.LostEvents() != 0 {
		t.Errorf("%q, %d lost", got, r.LostEvents())
	}
}

// With the right to create only, one that happens again is a new one.
func TestEventsWithoutPatch(t *testing.T) {
	r := newRig(t, nodeA)
	r.startEvents()
	send := func(n int) {
		r.Event(Event{Reason: "R", Message: "m"})
		r.wait(func() bool { return len(r.api.Events()) == n })
	}
	send(1)
	r.api.SetFault(nodestest.Forbid("PATCH"))
	send(2)
	if got := strings.Join(r.api.Events(), ", "); got != "Normal R a x1: m, Normal R a x2: m" {
		t.Error(got)
	}
}

// An API server that is away costs nothing but the events, and they are counted.
func TestEventsAreLost(t *testing.T) {
	r := newRig(t, nodeA)
	r.startEvents()
	r.api.SetFault(nodestest.Status(apierrors.NewServiceUnavailable("away")))
	r.Event(Event{Reason: "R", Message: "m"})
	r.wait(func() bool { return r.LostEvents() == 1 })
	r.api.SetFault(nil)
	r.Event(Event{Reason: "R", Message: "m"})
	r.wait(func() bool { return len(r.api.Events()) == 1 })
}

// Nobody waits for the API server, and it is not flooded.
func TestEventsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var count atomic.Int32
		q := newEventQueue(func(context.Context, Event, sent, bool) error {
			count.Add(1)
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { q.run(ctx); close(done) }()
		for range 100 {
			for i := range 100 {
				q.put(Event{Reason: "R", Message: fmt.Sprint(i)})
			}
			synctest.Wait()
		}
		if n, lost := count.Load(), (&Client{events: q}).LostEvents(); n != eventBurst || lost == 0 {
			t.Errorf("%d sent at once, %d lost", n, lost)
		}
		time.Sleep(10*time.Minute + time.Second)
		synctest.Wait()
		if n := count.Load(); n != eventBurst+20 {
			t.Errorf("%d sent in ten minutes", n)
		}
		cancel()
		<-done
	})
}

// The same is counted on for an hour, then it is another one.
func TestEventsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lines []string
		gone := false
		q := newEventQueue(func(_ context.Context, e Event, s sent, create bool) error {
			if gone && !create {
				return apierrors.NewNotFound(schema.GroupResource{Resource: "events"}, s.name)
			}
			lines = append(lines, fmt.Sprintf("%v %s x%d", create, e.Message, s.count))
			return nil
		})
		for i, pause := range []time.Duration{0, time.Minute, time.Minute, 2 * time.Hour, time.Minute} {
			time.Sleep(pause)
			gone = i == 4
			if err := q.deliver(t.Context(), Event{Message: "m"}, 1); err != nil {
				t.Error(err)
			}
		}
		if got, want := strings.Join(lines, ", "), "true m x1, false m x2, false m x3, true m x1, true m x2"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	})
}

func taint(key string, effect corev1.TaintEffect) corev1.Taint {
	return corev1.Taint{Key: key, Effect: effect}
}

func TestLiftTaint(t *testing.T) {
	const key = "node.bauta.dev/agent-not-ready"
	n := nodeA.DeepCopy()
	n.Spec.Taints = []corev1.Taint{taint("other", "NoSchedule"), taint(key, "NoSchedule"), taint(key, "NoExecute"), taint(key+"x", "NoSchedule")}
	r := newRig(t, n)
	r.start()
	r.await("taints", func(s Snapshot) bool { return len(s.Taints) == 4 })
	// Somebody else changes the node between our look and our change, three times.
	conflicts := 3
	r.api.SetFault(nodestest.Before("PATCH", func() {
		if conflicts--; conflicts >= 0 {
			other := r.api.Get("a")
			other.Spec.Taints = append(other.Spec.Taints, taint(fmt.Sprint("late", conflicts), "NoSchedule"))
			r.api.Put(other)
		}
	}))
	if err := r.LiftTaint(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, taint := range r.api.Get("a").Spec.Taints {
		keys = append(keys, taint.Key)
	}
	want := "other " + key + "x late2 late1 late0"
	if got := strings.Join(keys, " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	r.await("no taint", func(s Snapshot) bool { return strings.Join(s.Taints, " ") == want })
	version := r.api.Get("a").ResourceVersion
	if err := r.LiftTaint(t.Context(), key); err != nil || r.api.Get("a").ResourceVersion != version {
		t.Errorf("without the taint the node was changed: %v", err)
	}
	for _, fault := range []nodestest.Fault{
		nodestest.Status(apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "a", errors.New("no rule"))),
		nodestest.Status(apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "a", errors.New("again"))),
		nodestest.Answer("application/json", "garbage"),
	} {
		r.api.SetFault(fault)
		if err := r.LiftTaint(t.Context(), key); err == nil || !strings.Contains(err.Error(), "node a: lift taint "+key+": ") {
			t.Error(err)
		}
	}
}
