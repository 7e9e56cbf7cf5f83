package iptables

import "bauta.dev/bauta/internal/policy"

// mangle is the guard: what line 10 applies to and nat can't translate is dropped,
// before nat sees it. The chains of sources and destinations are those of nat.
func (r *renderer) mangle() Table {
	t := Table{Name: "mangle"}
	// Known connections first: every packet passes here.
	t.add(entryChain,
		"-m conntrack --ctstate ESTABLISHED -j RETURN",
		"-p "+r.f.icmp()+" -m conntrack --ctstate RELATED -j RETURN")
	for _, d := range r.in.Devices {
		t.add(entryChain, "-o "+d.Name+" -g "+sourceChain)
	}
	if r.f == IPv6 {
		// Never on the wire, and they must not pass for IPv4.
		const mapped = "::ffff:0.0.0.0/96"
		t.add(sourceChain, rule("-s "+mapped, reason(policy.DropBadHeader), "-j DROP"),
			rule("-d "+mapped, reason(policy.DropBadHeader), "-j DROP"))
	}
	t.add(sourceChain, r.sources()...)
	t.add(destinationChain, r.destinations()...)
	t.add(destinationChain, "-g "+guardChain)
	r.guard(&t)
	return t
}

// guard is what remains of line 10.
func (r *renderer) guard(t *Table) {
	next := "-j RETURN"
	if r.lacksAddress() {
		next = "-g " + addressChain
	}
	to := guardChain
	if r.in.UnknownProtocols != policy.UnknownMasquerade {
		to = stateChain
		for _, proto := range []string{"tcp", "udp", "udplite", "sctp", r.f.icmp()} {
			t.add(guardChain, "-p "+proto+" -g "+stateChain)
		}
		if r.in.UnknownProtocols == policy.UnknownPass {
			t.add(guardChain, rule(reason(policy.PassProtocol), "-j RETURN"))
		} else {
			t.add(guardChain, rule(reason(policy.DropProtocol), "-j DROP"))
		}
	}
	// What conntrack takes for no part of a connection, nat doesn't even see.
	t.add(to, rule("-m conntrack --ctstate INVALID,UNTRACKED", reason(policy.DropStray), "-j DROP"))
	queries := []int{8, 13}
	if r.f == IPv6 {
		queries = []int{128}
	}
	for _, typ := range queries {
		t.add(to, rule(r.f.icmpType(typ), next))
	}
	t.add(to, rule("-p "+r.f.icmp(), reason(policy.DropProtocol), "-j DROP"))
	if r.lacksAddress() {
		t.add(to, next)
		r.addressGuard(t)
	}
}

// addressGuard drops what leaves by a device that has no address for it.
func (r *renderer) addressGuard(t *Table) {
	t.add(addressChain)
	for _, route := range r.routes() {
		verdict := "-g " + deviceChain
		if route.Source.IsValid() {
			verdict = "-j RETURN"
		}
		t.add(addressChain, rule(match("-d", route.Prefix), verdict))
	}
	t.add(addressChain, "-g "+deviceChain)
	t.add(deviceChain)
	for _, d := range r.in.Devices {
		if !d.Addr(r.f == IPv4).IsValid() {
			t.add(deviceChain, rule("-o "+d.Name, reason(policy.DropNoAddress), "-j DROP"))
		}
	}
}

// lacksAddress tells whether a packet can meet a device without an address.
func (r *renderer) lacksAddress() bool {
	for _, d := range r.in.Devices {
		if !d.Addr(r.f == IPv4).IsValid() {
			return true
		}
	}
	return false
}
