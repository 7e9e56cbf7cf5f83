package config

import (
	"fmt"
	"math/bits"
	"net"
	"regexp"
	"strconv"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// Bounds of bpf-nat-global-max in flows (section 4).
const (
	minFlows     = 1024
	maxFlows     = 1 << 24
	minAutoFlows = 32768
	maxAutoFlows = 1048576
)

// one is for options without aliases.
func one(set func(*Config, setting) error) func(*Config, []setting) error {
	return func(c *Config, given []setting) error {
		s := given[0]
		if s.kind == Enum {
			var err error
			if s, err = s.enum(); err != nil {
				return err
			}
		}
		return set(c, s)
	}
}

func setBool(field func(*Config) *bool) func(*Config, []setting) error {
	return one(func(c *Config, s setting) (err error) {
		*field(c), err = s.bool()
		return err
	})
}

func setString(field func(*Config) *string) func(*Config, []setting) error {
	return one(func(c *Config, s setting) error {
		*field(c) = s.text()
		return nil
	})
}

func setDuration(field func(*Config) *time.Duration) func(*Config, []setting) error {
	return one(func(c *Config, s setting) (err error) {
		*field(c), err = s.duration()
		return err
	})
}

// Bounds of nat-timeout-*: the data plane counts in whole seconds, and a mapping
// that lives for more than a month is a slip of the pen.
const (
	minTimeout = time.Second
	maxTimeout = 30 * 24 * time.Hour
)

func setTimeout(def time.Duration, field func(*Config) *time.Duration) func(*Config, []setting) error {
	return one(func(c *Config, s setting) error {
		d, err := s.duration()
		if err != nil {
			return err
		}
		if d < minTimeout || d > maxTimeout {
			return s.refuse("out of bounds", fmt.Sprintf("write a duration from %s to %s (30 days), for example %s",
				shortDuration(minTimeout), shortDuration(maxTimeout), shortDuration(def)))
		}
		*field(c) = d
		return nil
	})
}

func setIPv6(c *Config, given []setting) (err error) {
	c.IPv6, err = given[0].bool()
	c.IPv6Explicit = given[0].source != fromDefault
	return err
}

func setRemoteNodes(c *Config, given []setting) error {
	for i, s := range given {
		v, err := s.remoteNodes()
		if err != nil {
			return err
		}
		if i > 0 && v != c.RemoteNodes {
			return conflict(given[0], s)
		}
		c.RemoteNodes = v
		c.RemoteNodesSet = s.source != fromDefault
	}
	return nil
}

func (s setting) remoteNodes() (policy.RemoteNodes, error) {
	if s.kind == Bool { // Cilium's switch
		on, err := s.bool()
		if on {
			return policy.RemoteAll, err
		}
		return policy.RemoteNone, err
	}
	s, err := s.enum()
	return policy.RemoteNodes(s.text()), err
}

// conflict is the error for an option and its alias with different values.
func conflict(a, b setting) error {
	return &Error{
		Msg: fmt.Sprintf("%s %q (%s) and %s %q (%s): two names of one option with different values",
			a.name, a.text(), a.source, b.name, b.text(), b.source),
		Hints: []string{fmt.Sprintf("give only %s", a.name)},
	}
}

// setLimit reads a number of things of which 0 is no limit.
func setLimit(what string, most int, field func(*Config) *int) func(*Config, setting) error {
	return func(c *Config, s setting) error {
		n, err := s.int()
		switch {
		case err != nil:
			return err
		case n < 0:
			return s.refuse("below zero", "write 0 for no limit, or the number of "+what)
		case n > most:
			return s.refuse(fmt.Sprintf("above %d", most), "write 0 for no limit, or the number of "+what)
		}
		*field(c) = n
		return nil
	}
}

// setMaxFlows rounds up to a power of two, as the kernel's hash tables do anyway.
func setMaxFlows(c *Config, s setting) error {
	n, err := s.int()
	if err != nil {
		return err
	}
	if n == 0 {
		c.MaxFlows = 0
		return nil
	}
	if s.dir {
		// Cilium counts entries, of which a flow has two, one for each direction.
		n = (n + 1) / 2
		if n > 0 && n < minFlows {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s (%s): %d flows, raised to %d", s.name, s.text(), s.source, n, minFlows))
			n = minFlows
		}
	}
	if n < minFlows || n > maxFlows {
		return s.refuse("out of bounds", fmt.Sprintf("write a number of flows from %d to %d, or 0 to size the table from memory", minFlows, maxFlows))
	}
	c.MaxFlows = roundUp(uint64(n))
	return nil
}

func roundUp(n uint64) uint32 { return 1 << bits.Len64(n-1) }

// flowBytes is what a flow is taken to cost in kernel memory: two hash entries.
const flowBytes = 256

// Flows returns the size of the flow table: bpf-nat-global-max, else sized for
// 0.25 % of the memory (Cilium's bpf-map-dynamic-size-ratio) within bounds.
func (c Config) Flows(memoryBytes uint64) uint32 {
	if c.MaxFlows != 0 {
		return c.MaxFlows
	}
	return roundUp(min(max(memoryBytes/400/flowBytes, minAutoFlows), maxAutoFlows))
}

func setMetricsAddr(c *Config, s setting) error {
	switch s.text() {
	case "off", "false": // an unquoted off is false in YAML
		c.MetricsAddr = ""
		return nil
	}
	_, port, err := net.SplitHostPort(s.text())
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return s.refuse("not an address to listen on", "write HOST:PORT or :PORT, for example :9965, or off")
	}
	c.MetricsAddr = s.text()
	return nil
}

// mostPods bounds the series of /metrics, whatever the option says.
const mostPods = 1000

func setMetricsPerPod(c *Config, s setting) error {
	n, err := s.int()
	switch {
	case err != nil:
		return err
	case n < 0 || n > mostPods:
		return s.refuse("out of bounds", fmt.Sprintf("write a number of addresses from 1 to %d, or 0 for none", mostPods))
	}
	c.MetricsPerPod = n
	return nil
}

func setLogLevel(c *Config, s setting) error {
	return c.LogLevel.UnmarshalText([]byte(s.text()))
}

// Unnamed is the value of take-over that says no more than yes.
const Unnamed = "true"

// setTakeOver takes what names a chain or a rule, and a switch that is off. What stands
// for on is for the agent to refuse: it knows what there is.
func setTakeOver(c *Config, s setting) error {
	c.TakeOver = s.text()
	if on, err := s.bool(); err == nil {
		c.TakeOver = ""
		if on {
			c.TakeOver = Unnamed
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s (%s): names nothing, the agent will not start: name a chain or a rule", s.name, s.text(), s.source))
		}
	}
	return nil
}

// taintKey is what the API server takes: a name, perhaps behind the prefix of a domain.
var taintKey = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)

func setTaint(c *Config, s setting) error {
	if c.StartupTaint = s.text(); !taintKey.MatchString(c.StartupTaint) {
		return s.refuse("not the key of a taint", "write the key alone, without value and effect, for example node.bauta.dev/agent-not-ready")
	}
	return nil
}
