package nodes

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// Event is something about this node that belongs into the list of its Events. Messages
// without what differs each time are counted as one.
type Event struct {
	Warning bool   // else it is Normal
	Reason  string // in CamelCase
	Message string
}

// Limits of Events. They are for people; a node that has much to tell must not be heard by
// the API server.
const (
	maxWaiting = 32               // different ones that wait to be sent
	maxKnown   = 256              // different ones that are counted on
	eventBurst = 10               // at once
	eventEvery = 30 * time.Second // then one each
	countOn    = time.Hour        // after that it is another one; the API server forgets them then

	maxMessage = 1024 // bytes; the API server takes no more
)

// sent is an Event that the API server has.
type sent struct {
	name  string
	first time.Time
	last  time.Time
	count int
}

// eventQueue holds what is to be sent. What can't be is lost, and counted.
type eventQueue struct {
	send   func(context.Context, Event, sent, bool) error // create, or else count on
	news   chan struct{}
	tokens float64
	filled time.Time

	mu      sync.Mutex
	waiting map[Event]int // how often
	order   []Event
	lost    uint64

	known map[Event]*sent // of the one goroutine that sends
}

func newEventQueue(send func(context.Context, Event, sent, bool) error) *eventQueue {
	return &eventQueue{
		send: send, news: make(chan struct{}, 1), tokens: eventBurst,
		waiting: make(map[Event]int), known: make(map[Event]*sent),
	}
}

// Event queues an Event. It never blocks.
func (c *Client) Event(e Event) { c.events.put(e) }

// LostEvents is how many could not be sent.
func (c *Client) LostEvents() uint64 {
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	return c.events.lost
}

// RunEvents sends Events until ctx is done, then returns nil.
func (c *Client) RunEvents(ctx context.Context) error {
	c.events.run(ctx)
	return nil
}

func (q *eventQueue) put(e Event) {
	if len(e.Message) > maxMessage {
		e.Message = strings.ToValidUTF8(e.Message[:maxMessage-3], "") + "..." // not half of a letter
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.waiting[e] > 0:
		q.waiting[e]++
		return
	case len(q.order) == maxWaiting:
		q.lost++
		return
	}
	q.waiting[e] = 1
	q.order = append(q.order, e)
	select {
	case q.news <- struct{}{}:
	default:
	}
}

// next takes the oldest Event that waits, with how often it happened.
func (q *eventQueue) next() (e Event, times int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.order) == 0 {
		return e, 0, false
	}
	e = q.order[0]
	q.order = q.order[1:]
	times = q.waiting[e]
	delete(q.waiting, e)
	return e, times, true
}

func (q *eventQueue) run(ctx context.Context) {
	q.filled = time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.news:
		}
		for {
			// First the right to send, then the Event: it is counted as long as it waits.
			if !q.waitForToken(ctx) {
				return
			}
			e, times, ok := q.next()
			if !ok {
				q.tokens++
				break
			}
			if err := q.deliver(ctx, e, times); err != nil {
				q.mu.Lock()
				q.lost += uint64(times)
				q.mu.Unlock()
			}
		}
	}
}

// waitForToken is a token bucket.
func (q *eventQueue) waitForToken(ctx context.Context) bool {
	for {
		now := time.Now()
		q.tokens = min(eventBurst, q.tokens+now.Sub(q.filled).Seconds()/eventEvery.Seconds())
		q.filled = now
		if q.tokens >= 1 {
			q.tokens--
			return ctx.Err() == nil
		}
		sleep(ctx, time.Duration((1-q.tokens)*float64(eventEvery))+time.Millisecond)
		if ctx.Err() != nil {
			return false
		}
	}
}

// eventTimeout is how long the API server may take for one.
const eventTimeout = 10 * time.Second

func (q *eventQueue) deliver(ctx context.Context, e Event, times int) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	now := time.Now()
	if s := q.known[e]; s != nil && now.Sub(s.last) < countOn {
		s.last, s.count = now, s.count+times
		err := q.send(ctx, e, *s, false)
		if !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
			return err
		}
		times = s.count // it was forgotten early, or only creating is allowed
	}
	if len(q.known) >= maxKnown {
		clear(q.known)
	}
	s := sent{name: eventName(e, now), first: now, last: now, count: times}
	if err := q.send(ctx, e, s, true); err != nil {
		return err
	}
	q.known[e] = &s
	return nil
}

func eventName(e Event, now time.Time) string {
	h := fnv.New32a()
	fmt.Fprint(h, e)
	return fmt.Sprintf("%x.%x", now.UnixNano(), h.Sum32())
}

// eventSender writes Events of a node.
func eventSender(client rest.Interface, node string) func(context.Context, Event, sent, bool) error {
	return func(ctx context.Context, e Event, s sent, create bool) error {
		name := fmt.Sprintf("%.200s.%s", node, s.name)
		stamp := s.last.UTC().Format(time.RFC3339)
		body := map[string]any{"count": s.count, "lastTimestamp": stamp}
		req := client.Patch(types.MergePatchType).Name(name)
		if create {
			kind := "Normal"
			if e.Warning {
				kind = "Warning"
			}
			// The namespace is that of events about what has none. kubectl describe node looks
			// for a uid that is the node's name.
			body = map[string]any{
				"apiVersion": "v1", "kind": "Event",
				"metadata":       map[string]any{"name": name, "namespace": eventNamespace},
				"involvedObject": map[string]any{"kind": "Node", "name": node, "uid": node, "apiVersion": "v1"},
				"type":           kind, "reason": e.Reason, "message": e.Message,
				"source":             map[string]any{"component": "bauta", "host": node},
				"reportingComponent": "bauta", "reportingInstance": node,
				"count": s.count, "firstTimestamp": s.first.UTC().Format(time.RFC3339), "lastTimestamp": stamp,
			}
			req = client.Post().SetHeader("Content-Type", runtime.ContentTypeJSON)
		}
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		return req.Namespace(eventNamespace).Resource("events").MaxRetries(0).
			SetHeader("Accept", runtime.ContentTypeJSON).Body(data).Do(ctx).Error()
	}
}

const eventNamespace = "default"
