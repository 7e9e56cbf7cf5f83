package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/nodes"
)

func eventTexts(list []nodes.Event) string {
	texts := make([]string, len(list))
	for i, e := range list {
		kind := "Normal"
		if e.Warning {
			kind = "Warning"
		}
		texts[i] = fmt.Sprintf("%s %s: %s", kind, e.Reason, e.Message)
	}
	return strings.Join(texts, "\n")
}

func TestHappened(t *testing.T) {
	addrs := func(device string, a ...string) map[string][2]netip.Addr {
		var pair [2]netip.Addr
		for i := range a {
			pair[i], _ = netip.ParseAddr(a[i])
		}
		return map[string][2]netip.Addr{device: pair}
	}
	for _, c := range []struct {
		name        string
		before, now moment
		want        string
	}{
		{"nothing", moment{}, moment{}, ""},
		{"bad file", moment{}, moment{config: "file f: bad"}, "Warning ConfigInvalid: file f: bad: the last good state stays in force"},
		{"still bad", moment{config: "file f: bad"}, moment{config: "file f: bad"}, ""},
		{"worse", moment{config: "file f: bad"}, moment{config: "file f: worse"}, "Warning ConfigInvalid: file f: worse: the last good state stays in force"},
		{"good again", moment{config: "file f: bad"}, moment{}, "Normal ConfigApplied: the configuration is valid again"},
		{"attached", moment{attach: "device eth1 is missing"}, moment{}, "Normal DeviceAttached: every device is attached"},
		{"not attached", moment{}, moment{attach: "device eth1 is missing"}, "Warning DeviceNotAttached: device eth1 is missing"},
		{"first address", moment{}, moment{addrs: addrs("eth0", "192.0.2.1")}, ""},
		{"address", moment{addrs: addrs("eth0", "192.0.2.1", "2001:db8::1")}, moment{addrs: addrs("eth0", "192.0.2.2", "2001:db8::1")},
			"Normal MasqueradeAddressChanged: device eth0: IPv4 masquerade address 192.0.2.2, was 192.0.2.1"},
		{"no address", moment{addrs: addrs("eth0", "192.0.2.1", "2001:db8::1")}, moment{addrs: addrs("eth0", "192.0.2.1")},
			"Warning MasqueradeAddressChanged: device eth0: IPv6 masquerade address none, was 2001:db8::1"},
		{"device gone", moment{addrs: addrs("eth0", "192.0.2.1")}, moment{addrs: addrs("eth1", "192.0.2.1")}, ""},
		{"rule", moment{foreign: []string{"a"}}, moment{foreign: []string{"a", "b"}}, "Warning ForeignMasquerade: b"},
		{"rule gone", moment{foreign: []string{"a"}}, moment{}, ""},
		{"ports, first look", moment{}, moment{noPort: 7, measured: true}, ""},
		{"ports", moment{noPort: 7, measured: true}, moment{noPort: 9, measured: true},
			"Warning PortsExhausted: connections of pods found no free external port (drop-no-port): bauta status names the remote, snat-port-range can be widened"},
		{"ports, no more", moment{noPort: 9, measured: true}, moment{noPort: 9, measured: true}, ""},
		{"counters anew", moment{noPort: 9, measured: true}, moment{noPort: 0, measured: true}, ""},
	} {
		if got := eventTexts(happened(c.before, c.now)); got != c.want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.name, got, c.want)
		}
	}
}

// What the loop shows, it tells the cluster, once.
func TestLoopTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newKubeBench(t, "devices=eth0,eth1", "enable-ip-masq-agent=true")
		var list []nodes.Event
		b.event = func(e nodes.Event) { list = append(list, e) }
		b.inspect = func() (inspector, error) { return fakeInspector{}, nil }
		write(t, b.list, goodList)
		b.run(t, func() {
			b.tell(members(1))
			after(time.Minute)
			write(t, b.list, badList)
			b.signals.ipMasq.put()
			after(time.Minute)
			b.set(func() { b.network = device(b.network, 3, "eth1", "198.51.100.1/24") })
			b.signals.network.put()
			after(time.Second)
			write(t, b.list, goodList)
			b.signals.ipMasq.put()
			after(time.Minute)
		})
		got := strings.Split(eventTexts(list), "\n")
		want := []string{"Warning DeviceNotAttached: device eth1 is missing", "Warning ConfigInvalid: ", "Normal DeviceAttached: ", "Normal ConfigApplied: "}
		if len(got) != len(want) {
			t.Fatalf("%q", got)
		}
		for i := range want {
			if !strings.HasPrefix(got[i], want[i]) {
				t.Errorf("event %d: %s, want %s", i, got[i], want[i])
			}
		}
	})
}

// The start-up taint goes when the node masquerades, not before, and again if it comes again.
func TestStartupTaint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const key = "node.bauta.dev/agent-not-ready"
		b := newKubeBench(t, "k8s-startup-taint="+key)
		b.kernel.set(errors.New("no memory"))
		refusals, lifted := 3, []string(nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		start := time.Now()
		go func() {
			done <- b.taintLifter(ctx, func(_ context.Context, key string) error {
				if refusals--; refusals >= 0 {
					return errors.New("forbidden")
				}
				lifted = append(lifted, fmt.Sprintf("%s %s", key, time.Since(start).Truncate(time.Minute)))
				b.tell(func(s *nodes.Snapshot) { s.Taints = nil })
				return nil
			})
		}()
		b.network = device(devices.Snapshot{}, 3, "bad0", "192.0.2.1/24") // can't be attached
		tainted := func(s *nodes.Snapshot) { members(1)(s); s.Taints = []string{"other", key} }
		b.run(t, func() {
			b.tell(tainted)
			after(time.Minute)
			if refusals != 3 {
				t.Error("lifted before a policy was in force")
			}
			b.kernel.set(nil)
			after(time.Minute)
			if refusals != 3 {
				t.Error("lifted before a device was attached")
			}
			b.set(func() { b.network = device(devices.Snapshot{}, 2, "eth0", "192.0.2.1/24") })
			b.signals.network.put()
			after(time.Minute)
			after(time.Hour)
			b.tell(tainted) // the node was registered again
			after(time.Minute)
		})
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := strings.Join(lifted, ", "); got != key+" 2m0s, "+key+" 1h3m0s" {
			t.Error(got)
		}
	})
}

// A policy without a device masquerades nothing: what pods sent would leave as it is.
func TestStartupTaintWaitsForADevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const key = "node.bauta.dev/agent-not-ready"
		b := newKubeBench(t, "k8s-startup-taint="+key, "devices=eth9")
		b.run(t, func() {
			b.tell(func(s *nodes.Snapshot) { members(1)(s); s.Taints = []string{key} })
			after(time.Minute)
			if unready := b.published.Load().health(time.Now()).Unready(); len(unready) == 0 {
				t.Error("ready without a device")
			}
			select {
			case <-b.signals.taint:
				t.Error("lifted without a device")
			default:
			}
			b.set(func() { b.network = device(b.network, 9, "eth9", "198.51.100.9/24") })
			b.signals.network.put()
			after(time.Second)
			select {
			case <-b.signals.taint:
			default:
				t.Errorf("not lifted: %v", b.published.Load().health(time.Now()).Unready())
			}
		})
	})
}
