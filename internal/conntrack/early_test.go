package conntrack

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// An answer that another translator has given the pod's address before netfilter sees it is
// no answer to an entry that translates: netfilter takes it for a new connection that
// has the addresses of the first, and gives it another port. So only one of the two may
// translate the answers of a flow.
func TestAnswersTranslatedEarly(t *testing.T) {
	labtest.Tool(t, "iptables-nft")
	r := &rig{labtest.NewNode(t, lab.Options{WorldKnowsPods: true}), t, "nft"}
	r.masquerade(true)
	for _, world := range r.Excluded.All() {
		outside, err := lab.ListenUDP(r.World, netip.AddrPortFrom(world, 4321))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, outside.Close)
		pod := netip.AddrPortFrom(r.PodAddrs[0].Of(world), 1234)
		inside, err := lab.ListenUDP(r.Pods[0], pod)
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, inside.Close)
		r.mustCreate(Flow{
			Proto: unix.IPPROTO_UDP, Src: pod, Dst: local(outside),
			Xlate: netip.AddrPortFrom(r.NodeAddr.Of(world), 45678), State: TwoWay,
		})
		if _, err := outside.WriteToUDPAddrPort([]byte("early"), pod); err != nil {
			t.Fatal(err)
		}
		if from, text := receive(t, inside); text != "early" || from == local(outside) {
			t.Errorf("%q from %s: netfilter knows it as an answer", text, from)
		}
	}
}
