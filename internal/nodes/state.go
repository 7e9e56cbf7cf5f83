package nodes

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// member is what is known of one Node.
type member struct {
	pods     []netip.Prefix
	addrs    []policy.NodeAddr
	taints   []string // of this node only
	problems []string
}

func newMember(n *node, own bool) *member {
	m := &member{}
	if own {
		m.taints = n.taints
	}
	origin := "node " + n.name
	for _, text := range n.podCIDRs {
		p, problem := parseRange(text)
		if problem != "" {
			m.problems = append(m.problems, problem)
		} else if !slices.Contains(m.pods, p) {
			m.pods = append(m.pods, p)
		}
	}
	for _, a := range n.addresses {
		addr, ok, problem := parseAddress(a)
		if problem != "" {
			m.problems = append(m.problems, problem)
		}
		addr.Node, addr.Origin = n.name, origin
		if ok && !slices.Contains(m.addrs, addr) {
			m.addrs = append(m.addrs, addr)
		}
	}
	return m
}

func (m *member) same(o *member) bool {
	return o != nil && slices.Equal(m.pods, o.pods) && slices.Equal(m.addrs, o.addrs) && slices.Equal(m.taints, o.taints) && slices.Equal(m.problems, o.problems)
}

// state is all that is known. One goroutine changes it, others take snapshots.
type state struct {
	own     string // name of this node
	changed func() // set before anything changes

	mu       sync.Mutex
	members  map[string]*member
	names    []string       // of members, sorted
	ranges   []netip.Prefix // the last ones that this node had
	seen     bool           // this node's object was there once
	synced   bool
	lastSync time.Time
	err      string
	since    time.Time
	lists    *Snapshot // rendered; nil: something has changed
}

func newState(own string) *state {
	return &state{own: own, changed: func() {}, members: make(map[string]*member)}
}

// replace takes a complete list.
func (s *state) replace(list map[string]*node) {
	s.mu.Lock()
	news := !s.synced || s.err != "" || len(list) != len(s.members)
	members := make(map[string]*member, len(list))
	for name, n := range list {
		m := newMember(n, name == s.own)
		if old := s.members[name]; m.same(old) {
			m = old
		} else {
			news = true
		}
		members[name] = m
	}
	s.members, s.names = members, slices.Sorted(maps.Keys(members))
	s.synced = true
	s.noteOwn()
	s.confirm()
	s.publish(news)
}

// put takes a node that was added or modified.
func (s *state) put(n *node) {
	m := newMember(n, n.name == s.own)
	s.mu.Lock()
	old, known := s.members[n.name]
	news := !m.same(old)
	if news {
		s.members[n.name] = m
		if !known {
			i, _ := slices.BinarySearch(s.names, n.name)
			s.names = slices.Insert(s.names, i, n.name)
		}
		s.noteOwn()
	}
	news = s.confirm() || news
	s.publish(news)
}

func (s *state) remove(name string) {
	s.mu.Lock()
	_, news := s.members[name]
	if news {
		delete(s.members, name)
		if i, ok := slices.BinarySearch(s.names, name); ok {
			s.names = slices.Delete(s.names, i, i+1)
		}
	}
	news = s.confirm() || news
	s.publish(news)
}

// heard notes that the API server answers.
func (s *state) heard() {
	s.mu.Lock()
	news := s.confirm()
	s.mu.Unlock()
	if news {
		s.changed()
	}
}

// fail notes why the API server can't be asked.
func (s *state) fail(text string) {
	s.mu.Lock()
	news := s.err != text
	if s.err == "" {
		s.since = time.Now()
	}
	s.err = text
	s.mu.Unlock()
	if news {
		s.changed()
	}
}

// noteOwn keeps the ranges of this node. Without its object, or while that has none, the
// last ones stay: pods have addresses of them.
func (s *state) noteOwn() {
	m, ok := s.members[s.own]
	if !ok {
		return
	}
	s.seen = true
	if len(m.pods) > 0 {
		s.ranges = m.pods
	}
}

// confirm tells whether the API server was away before.
func (s *state) confirm() (news bool) {
	s.lastSync = time.Now()
	news = s.err != ""
	s.err, s.since = "", time.Time{}
	return news
}

// publish ends a change that was begun by locking.
func (s *state) publish(news bool) {
	if news {
		s.lists = nil
	}
	s.mu.Unlock()
	if news {
		s.changed()
	}
}

func (s *state) snapshot() Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lists == nil {
		s.lists = s.render()
	}
	snap := *s.lists
	snap.Synced, snap.LastSync, snap.Error, snap.Since = s.synced, s.lastSync, s.err, s.since
	return snap
}

// maxRejected keeps a status readable.
const maxRejected = 10

func (s *state) render() *Snapshot {
	snap := &Snapshot{Known: len(s.members), Own: s.ranges}
	own := s.members[s.own]
	var mine []netip.Addr
	if own != nil {
		snap.Taints = own.taints
		for _, a := range own.addrs {
			mine = append(mine, a.Addr)
		}
	}
	rejected := 0
	for _, name := range s.names {
		m := s.members[name]
		for _, p := range m.problems {
			if rejected++; rejected <= maxRejected {
				snap.Rejected = append(snap.Rejected, fmt.Sprintf("node %s: %s", name, p))
			}
		}
		if name == s.own {
			continue
		}
		for _, p := range m.pods {
			// A node that came back under another name may have its former object beside it.
			if !slices.Contains(s.ranges, p) {
				snap.Pods = append(snap.Pods, policy.Rule{Prefix: p, Origin: "node " + name})
			}
		}
		for _, a := range m.addrs {
			if !slices.Contains(mine, a.Addr) {
				snap.Nodes = append(snap.Nodes, a)
			}
		}
	}
	if n := rejected - maxRejected; n > 0 {
		snap.Rejected = append(snap.Rejected, fmt.Sprintf("and %d more values of Node objects that can't be meant", n))
	}
	snap.Problem, snap.Unranged = s.problem(own), own != nil && len(own.pods) == 0
	return snap
}

// problem is what is wrong with this node's object.
func (s *state) problem(own *member) string {
	stay := ""
	if len(s.ranges) > 0 {
		stay = ", the last pod ranges stay in force"
	}
	switch {
	case !s.synced || own != nil && len(own.pods) > 0:
		return ""
	case own == nil && s.seen:
		return fmt.Sprintf("node %s: its Node object was deleted%s", s.own, stay)
	case own == nil:
		return fmt.Sprintf("node %s: there is no Node object of this name (k8s-node-name)", s.own)
	}
	return fmt.Sprintf("node %s: its Node object has no podCIDRs%s", s.own, stay)
}
