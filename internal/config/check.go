package config

import (
	"fmt"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// check refuses combinations that cannot work.
func (c *Config) check() error {
	for _, check := range []func() error{c.checkSources, c.checkPorts, c.checkDevices} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (c *Config) checkSources() error {
	if len(c.PodCIDRs) > 0 || c.MasqueradeForwarded || c.K8s || !c.IPv4 && !c.IPv6 {
		return nil
	}
	return &Error{
		Msg: "no masquerade source range: none of pod-cidrs, masquerade-forwarded and enable-k8s is set",
		Hints: []string{
			"--pod-cidrs 10.0.0.0/16 masquerades the pods of that range",
			"--masquerade-forwarded masquerades everything this machine forwards (routers, VM and container hosts)",
			"--enable-k8s takes the pod range of the local Node object",
		},
	}
}

func (c *Config) checkPorts() error {
	snat, nodePorts := c.describe("snat-port-range"), c.describe("node-port-range")
	for _, s := range c.SNATPorts {
		for _, n := range c.NodePorts {
			if s.overlaps(n) {
				return &Error{
					Msg:   fmt.Sprintf("%s overlaps %s", snat, nodePorts),
					Hints: []string{fmt.Sprintf("leave %s out of snat-port-range, for example 1024-29999,32768-65535, or change node-port-range", n)},
				}
			}
		}
	}
	if !Usable(c.Ports(nil)) {
		return &Error{
			Msg:   fmt.Sprintf("%s: no port from 1024 on is left without %s", snat, c.describe("reserved-ports")),
			Hints: []string{"widen snat-port-range or shorten reserved-ports"},
		}
	}
	return nil
}

func (c *Config) checkDevices() error {
	if !c.BPF || len(c.Devices) == 0 || len(c.EgressInterfaces) == 0 || c.Devices.same(c.EgressInterfaces) {
		return nil
	}
	return &Error{
		Msg:   fmt.Sprintf("%s and %s: in eBPF mode both mean the same, but differ", c.describe("devices"), c.describe("egress-masquerade-interfaces")),
		Hints: []string{"give only devices"},
	}
}

// describe is an option with value and source, for messages.
func (c *Config) describe(name string) string {
	i := slices.IndexFunc(c.effective, func(e Effective) bool { return e.Option == name })
	return fmt.Sprintf("%s %q (%s)", name, c.effective[i].Value, c.effective[i].Source)
}

// warn notes what works, but hardly as meant. An option has no effect when
// another one decides that it is not looked at.
func (c *Config) warn() {
	mode, why := BPFMode, "enable-bpf-masquerade is true"
	if !c.BPF {
		mode, why = IPTablesMode, "enable-bpf-masquerade is false"
	}
	needs := map[string]struct {
		met  bool
		name string
	}{
		"ip-masq-agent-config-path": {c.IPMasqAgent, "enable-ip-masq-agent"},
		"ip-masq-agent-profile":     {c.IPMasqAgent, "enable-ip-masq-agent"},
		"k8s-kubeconfig-path":       {c.K8s, "enable-k8s"},
		"k8s-startup-taint":         {c.K8s, "enable-k8s"},
	}
	for _, o := range options {
		i := slices.IndexFunc(c.effective, func(e Effective) bool { return e.Option == o.Name })
		if e := c.effective[i]; e.Source == fromDefault || e.Value == o.Default {
			continue
		}
		if o.Mode != AnyMode && o.Mode != mode {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s has no effect: %s", c.describe(o.Name), why))
		}
		if need, ok := needs[o.Name]; ok && !need.met {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s has no effect: %s is false", c.describe(o.Name), need.name))
		}
	}
	if len(c.Devices) > 0 && len(c.EgressInterfaces) > 0 && !c.Devices.same(c.EgressInterfaces) { // iptables mode: see checkDevices
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s has no effect: egress-masquerade-interfaces is given too", c.describe("devices")))
	}
	for _, r := range slices.Concat(c.Native4, c.Native6) {
		if r.Prefix.Bits() == 0 {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s: nothing of this family is masqueraded", r.Origin, r.Prefix))
		}
	}
	c.warnFamilies()
}

func (c *Config) warnFamilies() {
	for _, list := range [][]policy.Rule{c.PodCIDRs, c.Native4, c.Native6} {
		for _, r := range list {
			is4 := r.Prefix.Addr().Is4()
			if is4 && !c.IPv4 || !is4 && !c.IPv6 {
				c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s has no effect: masquerading is off for its family", r.Origin, r.Prefix))
			}
		}
	}
}
