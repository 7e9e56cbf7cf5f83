package agent

import (
	"fmt"
	"sync/atomic"
	"time"
)

// A condition is something that is wrong. Status and readiness are the same list: what
// is degraded is every one of them, what keeps a node from being ready are some.
type condition struct {
	text    string
	unready bool // nothing, or not what is wanted, is masqueraded
}

// Degraded returns what is wrong, a reason each; none means OK.
func (s Status) Degraded() []string {
	return texts(s.conditions(), func(condition) bool { return true })
}

// Unready returns why the node is not ready to masquerade, a reason each; none means it is.
func (s Status) Unready() []string {
	return texts(s.conditions(), func(c condition) bool { return c.unready })
}

func texts(list []condition, which func(condition) bool) (out []string) {
	for _, c := range list {
		if which(c) {
			out = append(out, c.text)
		}
	}
	return out
}

// health is the view with what the owner of the data plane knows of it: no look at the
// kernel, so it costs nothing and can't block.
func (v *view) health(now time.Time) Status {
	s, _ := v.status(now, nil) // only a kernel can make an error
	s.addAttached(v.attached)
	return s
}

// fullPercent is from where on a table counts as nearly full.
const fullPercent = 90

func (s Status) conditions() []condition {
	var list []condition
	add := func(unready bool, format string, args ...any) {
		list = append(list, condition{fmt.Sprintf(format, args...), unready})
	}

	if s.Agent.State == Down && s.Datapath.Present {
		add(true, "agent down")
	}
	for _, problem := range s.configErrors() {
		add(true, "config rejected: %s", problem)
	}
	switch {
	case s.Agent.Error != "":
		add(!s.Agent.Ready, "policy not applied: %s", s.Agent.Error) // an older one may be in force
	case s.Agent.AttachError != "":
		add(!s.Agent.Ready, "%s", s.Agent.AttachError)
	case s.Agent.Waiting != "":
		add(true, "%s", s.Agent.Waiting)
	case s.Agent.State == Running && !s.Agent.Ready:
		add(true, "no policy applied yet")
	}
	if s.Agent.HTTPError != "" {
		add(false, "%s", s.Agent.HTTPError)
	}
	if s.Ports.Error != "" {
		add(false, "%s", s.Ports.Error)
	}
	for _, l := range s.Leaks.Devices {
		if l.LastSeconds <= leakAlarm {
			add(false, "leak on %s: %d packets left with an address that should have been masqueraded", l.Device, l.Packets)
		}
	}
	if !s.Masquerading.Enabled {
		return list
	}
	list = append(list, s.nodeConditions()...)
	list = append(list, s.deviceConditions()...)
	list = append(list, s.tableConditions()...)
	if s.Agent.Ready && s.Sources.IPv4.none() && s.Sources.IPv6.none() {
		add(true, "no source range yet")
	}
	return list
}

// configErrors are why files are not accepted as they are now.
func (s Status) configErrors() (list []string) {
	for _, problem := range []string{s.Agent.ConfigError, s.IPMasqAgent.LastError, s.Nodes.LastError} {
		if problem != "" {
			list = append(list, problem)
		}
	}
	return list
}

// nodeConditions is what is wrong with what is known of the cluster's nodes. With Kubernetes
// it is here that a node waits until Node objects have been read once.
func (s Status) nodeConditions() (list []condition) {
	if k := s.Kubernetes; k != nil && k.Problem != "" {
		list = append(list, condition{text: k.Problem})
	}
	if k := s.Kubernetes; k != nil && k.Error != "" && !s.Agent.Ready {
		list = append(list, condition{text: "API server: " + k.Error})
	}
	return list
}

func (s Status) tableConditions() (list []condition) {
	for _, f := range []struct {
		name         string
		flows, limit int
	}{
		{"IPv4", s.Flows.IPv4.Flows, s.Flows.IPv4.Limit},
		{"IPv6", s.Flows.IPv6.Flows, s.Flows.IPv6.Limit},
	} {
		if f.flows*100 > f.limit*fullPercent {
			list = append(list, condition{text: fmt.Sprintf("%s flow table: %d of %d flows, more than %d %% full", f.name, f.flows, f.limit, fullPercent)})
		}
	}
	if c := s.Flows.Conntrack; c != nil && c.Entries*100 > c.Limit*fullPercent {
		list = append(list, condition{text: fmt.Sprintf("conntrack table: %d of %d connections, more than %d %% full", c.Entries, c.Limit, fullPercent)})
	}
	return list
}

// none tells whether the family has no range that could be masqueraded.
func (f FamilySources) none() bool { return f.State == SourcesOff || len(f.Ranges) == 0 }

// deviceConditions is what is wrong with devices and their addresses. A family counts only
// where it masquerades something. One device that does its work is enough to be ready.
func (s Status) deviceConditions() (list []condition) {
	used4, used6 := s.Sources.IPv4.State == SourcesUsed, s.Sources.IPv6.State == SourcesUsed
	var devices, attached, have4, have6 int
	for _, d := range s.Devices {
		if d.State == DeviceAttached {
			attached++
			have4 += one(d.IPv4.IsValid())
			have6 += one(d.IPv6.IsValid())
		}
	}
	add := func(unready bool, format string, args ...any) {
		list = append(list, condition{fmt.Sprintf(format, args...), unready})
	}
	for _, d := range s.Devices {
		if d.State == DeviceDraining {
			continue
		}
		devices++
		switch d.State {
		case DeviceMissing:
			add(attached == 0, "device %s is missing", d.Name)
			continue
		case DevicePending:
			add(attached == 0, "device %s is not attached", d.Name)
		}
		if used4 && !d.IPv4.IsValid() {
			add(have4 == 0, "device %s has no IPv4 address to masquerade with", d.Name)
		}
		if used6 && !d.IPv6.IsValid() {
			add(have6 == 0, "device %s has no IPv6 address to masquerade with", d.Name)
		}
	}
	if devices == 0 && (used4 || used6) && s.Agent.Ready {
		add(true, "no device to masquerade on")
	}
	return list
}

func one(is bool) int {
	if is {
		return 1
	}
	return 0
}

// pulse says when the loop was last seen at its beginning.
type pulse struct{ at atomic.Pointer[time.Time] }

func (p *pulse) beat() {
	now := time.Now() // with the monotonic clock
	p.at.Store(&now)
}

// silent is for how long there was no beat; zero before the first.
func (p *pulse) silent() time.Duration {
	if at := p.at.Load(); at != nil {
		return time.Since(*at)
	}
	return 0
}
