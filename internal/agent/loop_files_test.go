package agent

import (
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLoopKeepsTheLastGoodList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true")
		write(t, b.list, goodList)
		got := b.run(t, func() {
			write(t, b.list, badList)
			b.signals.ipMasq.put()
			after(time.Second)
			s, err := b.published.Load().status(time.Now(), nil)
			if err != nil || s.IPMasqAgent.InForce != FromLastGood || !strings.Contains(strings.Join(s.Degraded(), "; "), "config rejected: ") {
				t.Errorf("%+v %v", s.IPMasqAgent, err)
			}
			if f, err := ReadPolicyFile(b.runDir); err != nil || f.IPMasqAgent.LastError == "" || len(f.NonMasq) != 1 {
				t.Errorf("policy.json: %+v %v", f.IPMasqAgent, err)
			}
			os.Remove(b.list)
			b.reload <- struct{}{}
			after(time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0
			 1.00s apply devices=[eth0 192.0.2.1] nonmasq=[13 prefixes] nodes=0`)
	})
}

// A file that was read while it was gone for a moment, and was back as the watcher
// knew it when that looked: nobody says that it is back.
func TestLoopReadsAgainWhatItReadInBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true")
		write(t, b.list, goodList)
		got := b.run(t, func() {
			after(time.Second)
			if err := os.Remove(b.list); err != nil {
				t.Error(err)
			}
			b.signals.ipMasq.put()
			after(50 * time.Millisecond)
			write(t, b.list, goodList)
			after(time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0
			 1.00s apply devices=[eth0 192.0.2.1] nonmasq=[13 prefixes] nodes=0
			 1.50s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0`)
	})
}

// The same, when it was the second reading that found the file gone.
func TestLoopReadsUntilNothingIsNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "enable-ip-masq-agent=true")
		write(t, b.list, goodList)
		got := b.run(t, func() {
			after(time.Second)
			b.signals.ipMasq.put()
			after(450 * time.Millisecond)
			if err := os.Remove(b.list); err != nil {
				t.Error(err)
			}
			after(100 * time.Millisecond)
			write(t, b.list, goodList)
			after(2 * time.Second)
		})
		check(t, got, `
			 0.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0
			 1.50s apply devices=[eth0 192.0.2.1] nonmasq=[13 prefixes] nodes=0
			 2.00s apply devices=[eth0 192.0.2.1] nonmasq=[10.0.0.0/8] nodes=0`)
	})
}
