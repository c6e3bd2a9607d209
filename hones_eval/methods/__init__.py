"""The methods: which sites each scores, how, and what scale it chooses. None of them imports another."""
