package iptables

import (
	"maps"
	"testing"
)

func TestCountDrops(t *testing.T) {
	const out = `*mangle
:POSTROUTING ACCEPT [9:900]
:BAUTA-GUARD - [0:0]
[7:700] -A POSTROUTING -m comment --comment drop-stray -j DROP
[3:300] -A BAUTA-GUARD -m conntrack --ctstate INVALID,UNTRACKED -m comment --comment drop-stray -j DROP
[4:400] -A BAUTA-ADDRESS -m comment --comment drop-no-address -j DROP
[2:200] -A BAUTA-GUARD -p icmp -m comment --comment drop-stray -j DROP
[8:800] -A BAUTA-GUARD -m comment --comment pass-protocol -j RETURN
[0:0] -A BAUTA-GUARD -m comment --comment drop-protocol -j DROP
COMMIT
`
	got := make(map[string]uint64)
	countDrops(out, got)
	if want := map[string]uint64{"drop-stray": 5, "drop-no-address": 4, "drop-protocol": 0}; !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
